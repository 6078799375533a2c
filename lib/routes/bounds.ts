import type { FastifyInstance } from 'fastify'
import { Deadline } from '../deadline.ts'
import { DEFAULTS } from '../options.ts'
import type { ReceivingOptions } from '../options.ts'
import type { BodyBounds } from '../pipeline/capture.ts'

/** The limits on bodies, which apply before their sender is known. */
export class Bounds {
  readonly #requestTimeout: number
  /** Keyed by ms. */
  readonly #deadlines = new Map<number, Deadline>()

  constructor (readonly options: ReceivingOptions, { initialConfig }: FastifyInstance) {
    // `requestTimeout` is applied here as well, because Node checks it only every 30 s, and not at all under HTTP/2.
    const { requestTimeout = 0 } = initialConfig as { requestTimeout?: number }
    this.#requestTimeout = requestTimeout > 0 ? requestTimeout : Infinity
  }

  /** @param ofRoute Fastify's `bodyLimit` option of a marked route, in bytes */
  of ({ bodyLimit, bodyTimeout }: ReceivingOptions, ofRoute?: number): BodyBounds {
    const ms = Math.min(bodyTimeout ?? this.options.bodyTimeout ?? DEFAULTS.bodyTimeout, this.#requestTimeout)
    let deadline = this.#deadlines.get(ms)
    if (deadline === undefined) this.#deadlines.set(ms, deadline = new Deadline(ms))
    return { limit: bodyLimit ?? ofRoute ?? this.options.bodyLimit ?? DEFAULTS.bodyLimit, deadline }
  }

  /** To be called when the app is closing. A body that is still arriving must not keep the app open, because OpenAI sends the delivery again. */
  close (): void {
    for (const deadline of this.#deadlines.values()) deadline.close()
  }
}
