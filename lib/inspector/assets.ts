import { readFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'

export interface Assets {
  /** HTML. `{{base}}` stands for the path of the other two. */
  readonly page: string
  readonly script: string
  readonly style: string
}

let assets: Promise<Assets> | undefined

/** Reads the files that `npm run build` made. */
export async function readAssets (): Promise<Assets> {
  assets ??= read()
  return await assets
}

async function read (): Promise<Assets> {
  // Resolved by the package's name, because a bundler may have moved this module to any file.
  const root = dirname(createRequire(import.meta.url).resolve('fastify-openai-webhook/package.json'))
  const [page, script, style] = await Promise.all(['index.html', 'page.js', 'page.css'].map(name => readFile(join(root, 'dist/inspector/page', name), 'utf8')))
  return { page: page!, script: script!, style: style! }
}
