export interface Linked<T> {
  /** Its neighbours in the list; kept by the list. */
  earlier: T | undefined
  later: T | undefined
}

/** A list in the order of insertion. An item is in one list at a time, and costs two links in itself. */
export class LinkedList<T extends Linked<T>> {
  first: T | undefined
  #last: T | undefined

  append (item: T): void {
    item.earlier = this.#last
    if (this.#last === undefined) this.first = item
    else this.#last.later = item
    this.#last = item
  }

  /** @param item of this list */
  remove (item: T): void {
    const { earlier, later } = item
    if (earlier === undefined) this.first = later
    else earlier.later = later
    if (later === undefined) this.#last = earlier
    else later.earlier = earlier
    item.earlier = item.later = undefined
  }
}
