import type { IdempotencyStore } from './store.ts'

/** Remembers nothing: `idempotency: false`. */
export const noStore: IdempotencyStore = {
  begin: () => ({ state: 'claimed', token: '', finished: [] }),
  checkpoint () {},
  complete () {},
  extend: () => true,
  release () {}
}
