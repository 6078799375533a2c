// Runs TypeScript in tests, as `--import` of every test process, because tap's own loader takes 1.5 s of CPU per process. The output is
// cached by content, so that a process mostly only reads files. `npm run typecheck` checks the types.
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
    // Another process may be writing the same file.
    const own = `${kept}.${process.pid}.${isMainThread}`
    mkdirSync(cache, { recursive: true })
    writeFileSync(own, code)
    renameSync(own, kept)
    return code
  }
}

// On Node 20, tap overrides the setting of .taprc for the processes that tests start. Its loader would produce other lines than this one,
// and the coverage could not be added up.
process.env['TAP_TYPE_STRIP_ONLY'] = '1'

const isOurs = url => url.startsWith('file:') && url.endsWith('.ts') && !url.includes('/node_modules/')

export function load (url, context, nextLoad) {
  return isOurs(url) ? { format: 'module', source: transpiled(fileURLToPath(url)), shortCircuit: true } : nextLoad(url, context)
}

// As ES modules the package consists of hundreds of files. Where a thread answers for each file, that takes 0.3 s of CPU per process.
const isManyFiles = specifier => specifier.startsWith('@sinclair/typebox')

export function resolve (specifier, context, nextResolve) {
  if (!isManyFiles(specifier)) return nextResolve(specifier, context)
  return nextResolve(specifier, { ...context, conditions: context.conditions.map(condition => condition === 'import' ? 'require' : condition) })
}

// tap counts the coverage in a hook of its own, which has to see the output of this hook: it must be of the same kind and registered later.
// tap's hook is of another kind from these versions on.
const [major, minor] = process.versions.node.split('.').map(Number)
const inThread = major > 25 || (major === 25 && minor >= 1) || (major === 24 && minor >= 13)
if (inThread) module.registerHooks({ load, resolve })
else if (isMainThread) module.register(import.meta.url)

// A program that a test starts is a user's program in any folder, where this relative path would lead nowhere.
const options = process.env.NODE_OPTIONS
if (options !== undefined) process.env.NODE_OPTIONS = options.replace(/"?--import=\.\/test\/support\/typescript\.js"?/, '').trim()
