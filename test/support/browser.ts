import { existsSync } from 'node:fs'
import { chromium } from 'playwright-core'
import type { Browser } from 'playwright-core'
import { CHROMIUM } from './missing.ts'

export { chromiumMissing } from './missing.ts'

/** Starts Debian's Chromium, and closes it when the test ends. */
export async function openBrowser (t: { teardown: (fn: () => unknown) => void }): Promise<Browser> {
  if (!existsSync(CHROMIUM)) throw new Error(`expected a browser at ${CHROMIUM}`)
  const browser = await chromium.launch({ executablePath: CHROMIUM, args: ['--no-sandbox', '--disable-dev-shm-usage'] })
  t.teardown(async () => await browser.close())
  return browser
}
