/** Bytes of one page: 16 times the largest body that is copied, so that little is left unused at its end. */
const PAGE = 65_536

/** Copies small bodies one after the other into pages. A page is freed when no delivery in it is kept. */
export class Pages {
  /** The page that holds the last copy. */
  page = Buffer.alloc(0)
  #used = 0

  /** @returns where in `page` the copy begins */
  copy (bytes: Buffer): number {
    if (this.#used + bytes.length > this.page.length) {
      this.page = Buffer.allocUnsafeSlow(PAGE)
      this.#used = 0
    }
    const from = this.#used
    bytes.copy(this.page, from)
    this.#used += bytes.length
    return from
  }
}
