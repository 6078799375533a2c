/** Whether `npm run test:long` runs. It runs tests at full size that `npm test` runs at a small size. */
export const isLong = process.env['TEST_LONG'] === '1'

export function sized (small: number, full: number): number {
  return isLong ? full : small
}
