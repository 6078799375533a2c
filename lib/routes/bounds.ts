import type { FastifyInstance } from 'fastify'
import { Deadline } from '../deadline.ts'
import { DEFAULTS } from '../options.ts'
import type { ReceivingOptions } from '../options.ts'
import type { BodyBounds } from '../pipeline/capture.ts'

/** The bounds of bodies, before it is known who has sent them. */
export class Bounds {
  readonly #options: ReceivingOptions
  readonly #requestTimeout: number
  /** By their ms. */
  readonly #deadlines = new Map<number, Deadline>()

  constructor (options: ReceivingOptions, { initialConfig }: FastifyInstance) {
    this.#options = options
    // Applied here as well: Node checks it every 30 s, and not at all under HTTP/2.
    const { requestTimeout = 0 } = initialConfig as { requestTimeout?: number }
    this.#requestTimeout = requestTimeout > 0 ? requestTimeout : Infinity
  }

  /** @param ofRoute a marked route's own Fastify `bodyLimit` */
  of ({ bodyLimit, bodyTimeout }: ReceivingOptions, ofRoute?: number): BodyBounds {
    const ms = Math.min(bodyTimeout ?? this.#options.bodyTimeout ?? DEFAULTS.bodyTimeout, this.#requestTimeout)
    let deadline = this.#deadlines.get(ms)
    if (deadline === undefined) this.#deadlines.set(ms, deadline = new Deadline(ms))
    return { limit: bodyLimit ?? ofRoute ?? this.#options.bodyLimit ?? DEFAULTS.bodyLimit, deadline }
  }

  /** The app is closing: a body that is still arriving must not hold it open, since its delivery comes again. */
  close (): void {
    for (const deadline of this.#deadlines.values()) deadline.close()
  }
}
