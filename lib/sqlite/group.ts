/** The method of a database that a group needs. */
export interface Transactions {
  /** Commits everything that `work` writes, or nothing. */
  transaction<T> (work: () => T): T
}

interface Member {
  readonly work: () => unknown
  readonly unwritten: (() => unknown) | undefined
  readonly resolve: (result: any) => void
  readonly reject: (error: unknown) => void
}

/**
 * Puts the writes of one turn of the event loop into one transaction, because the fsync is what makes a commit expensive.
 *
 * Nothing is awaited between BEGIN and COMMIT, so that no other statement on the handle runs in between.
 */
export class Group {
  #members: Member[] = []

  constructor (readonly database: Transactions) {}

  /**
   * @param work runs in a transaction together with the work of other calls. If one of them throws, each runs again in its own transaction
   * @param unwritten returns the answer if nothing can be written, or `undefined` if there is none
   * @returns the result of `work`, once the commit has succeeded; rejects if `work` threw or the commit failed
   */
  write<T> (work: () => T, unwritten?: () => T | undefined): Promise<T> {
    return new Promise((resolve, reject) => {
      // setImmediate runs after the socket events of this turn, so that their writes share the commit.
      if (this.#members.push({ work, unwritten, resolve, reject }) === 1) setImmediate(() => this.#commit())
    })
  }

  #commit (): void {
    const members = this.#members
    this.#members = []
    let at: 'begin' | 'work' | 'commit' = 'begin'
    try {
      const results = this.database.transaction(() => {
        at = 'work'
        const results = members.map(({ work }) => work())
        at = 'commit'
        return results
      })
      members.forEach(({ resolve }, index) => resolve(results[index]))
    } catch (error) {
      members.forEach(this.#otherwise(at, members.length, error))
    }
  }

  #otherwise (at: 'begin' | 'work' | 'commit', size: number, error: unknown): (member: Member) => void {
    if (at === 'begin') return member => answerUnwritten(member, error)
    // One member may be at fault, so each runs in its own transaction.
    if (at === 'work' && size > 1) return member => this.#commitAlone(member)
    return ({ reject }) => reject(error)
  }

  #commitAlone ({ work, resolve, reject }: Member): void {
    try {
      resolve(this.database.transaction(work))
    } catch (error) {
      reject(error)
    }
  }
}

function answerUnwritten ({ unwritten, resolve, reject }: Member, error: unknown): void {
  try {
    const answer = unwritten?.()
    if (answer !== undefined) return resolve(answer)
  } catch {
    // If reading fails too, the first error says more.
  }
  reject(error)
}
