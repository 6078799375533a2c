/** `npm run test:long` runs at full size what `npm test` runs at a small one. */
export const isLong = process.env['TEST_LONG'] === '1'

export function sized (small: number, full: number): number {
  return isLong ? full : small
}
