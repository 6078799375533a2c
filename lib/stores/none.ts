import type { IdempotencyStore } from './store.ts'

/** The store for `idempotency: false`, which remembers nothing. */
export const noStore: IdempotencyStore = {
  begin: () => ({ state: 'claimed', token: '', finished: [] }),
  checkpoint () {},
  complete () {},
  extend: () => true,
  release () {}
}
