/** Whether `npm run test:long` runs. It runs tests at full size that `npm test` runs at a small size. */
export const isLong = process.env['TEST_LONG'] === '1'

export function sized (small: number, full: number): number {
  return isLong ? full : small
}

type Test = typeof import('tap').default

/** Defines a test that `npm run test:long` alone runs. */
export function long (t: Pick<Test, 'test'>, name: string, options: { skip?: string | false }, test: (t: Test) => Promise<void>): void {
  if (isLong) t.test(name, options, test as never)
}
