import { readFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'

export interface Assets {
  /** HTML in which `{{base}}` stands for where the others are. */
  readonly page: string
  readonly script: string
  readonly style: string
}

let assets: Promise<Assets> | undefined

/** The page, as `npm run build` has made it. */
export async function readAssets (): Promise<Assets> {
  assets ??= read()
  return await assets
}

async function read (): Promise<Assets> {
  // By the package's name: this module may stand in any file of a bundle.
  const root = dirname(createRequire(import.meta.url).resolve('fastify-openai-webhook/package.json'))
  const [page, script, style] = await Promise.all(['index.html', 'page.js', 'page.css'].map(name => readFile(join(root, 'dist/inspector/page', name), 'utf8')))
  return { page: page!, script: script!, style: style! }
}
