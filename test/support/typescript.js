// Runs TypeScript in tests, as `--import` of every test process: tap's own loader takes 1.5 s of CPU a process. What has
// been transpiled is kept by its content, so that a process mostly reads. Types are checked by `npm run typecheck`.
import { createHash } from 'node:crypto'
import { mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import module, { createRequire } from 'node:module'
import { fileURLToPath } from 'node:url'
import { isMainThread } from 'node:worker_threads'

const require = createRequire(import.meta.url)
const cache = fileURLToPath(new URL('../../node_modules/.cache/openai-webhook-tests/', import.meta.url))
const { version } = require('esbuild/package.json')

function transpiled (file) {
  const source = readFileSync(file, 'utf8')
  const kept = `${cache}${createHash('sha1').update(`${version} ${file}\n${source}`).digest('hex')}.js`
  try {
    return readFileSync(kept, 'utf8')
  } catch {
    const { code } = require('esbuild').transformSync(source, { loader: 'ts', format: 'esm', target: 'node20', sourcefile: file, sourcemap: 'inline' })
    // Another process may be at the same file.
    const own = `${kept}.${process.pid}.${isMainThread}`
    mkdirSync(cache, { recursive: true })
    writeFileSync(own, code)
    renameSync(own, kept)
    return code
  }
}

// On Node 20 tap takes back for the processes that tests start what .taprc says: its loader would write other lines than
// this one, and what is covered could not be added up.
process.env['TAP_TYPE_STRIP_ONLY'] = '1'

const isOurs = url => url.startsWith('file:') && url.endsWith('.ts') && !url.includes('/node_modules/')

export function load (url, context, nextLoad) {
  return isOurs(url) ? { format: 'module', source: transpiled(fileURLToPath(url)), shortCircuit: true } : nextLoad(url, context)
}

// As ES modules they are hundreds of files, which takes 0.3 s of CPU a process where a thread answers for each.
const isManyFiles = specifier => specifier.startsWith('@sinclair/typebox')

export function resolve (specifier, context, nextResolve) {
  if (!isManyFiles(specifier)) return nextResolve(specifier, context)
  return nextResolve(specifier, { ...context, conditions: context.conditions.map(condition => condition === 'import' ? 'require' : condition) })
}

// tap counts what is covered in a hook of its own, which has to see what comes out of this one: of the same kind, and
// registered later. It changes kind with these versions.
const [major, minor] = process.versions.node.split('.').map(Number)
const inThread = major > 25 || (major === 25 && minor >= 1) || (major === 24 && minor >= 13)
if (inThread) module.registerHooks({ load, resolve })
else if (isMainThread) module.register(import.meta.url)

// What a test starts is a user's program, in whatever folder: its own, from which the path would lead nowhere.
const options = process.env.NODE_OPTIONS
if (options !== undefined) process.env.NODE_OPTIONS = options.replace(/"?--import=\.\/test\/support\/typescript\.js"?/, '').trim()
