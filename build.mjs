// npm run build: what the package's `exports` and `bin` lead to, from the files of lib/ of the same names.
import { copyFile, rm } from 'node:fs/promises'
import { readFileSync } from 'node:fs'
import { build } from 'esbuild'

const { bin, dependencies, exports, peerDependencies } = JSON.parse(readFileSync('package.json', 'utf8'))
const built = [...Object.values(exports).map(target => target.default), ...Object.values(bin)].filter(file => file !== undefined)

await rm('dist', { recursive: true, force: true })
await build({
  // The event table is for docs/generate.mjs and the benchmark.
  entryPoints: [...new Set(built.map(file => file.replace('./dist/', 'lib/').replace(/js$/, 'ts'))), 'lib/events/index.ts'],
  outdir: 'dist',
  outbase: 'lib',
  bundle: true,
  splitting: true,
  chunkNames: 'shared/[name]-[hash]',
  platform: 'node',
  format: 'esm',
  target: 'node20',
  external: [...Object.keys(dependencies), ...Object.keys(peerDependencies)].filter(name => name !== '@sinclair/typebox'),
  logLevel: 'warning'
})

// The inspector's page: one HTML, one script, one style.
await build({
  entryPoints: [{ in: 'page/main.ts', out: 'page' }, { in: 'page/page.css', out: 'page' }],
  outdir: 'dist/inspector/page',
  bundle: true,
  minify: true,
  platform: 'browser',
  format: 'esm',
  target: 'es2022',
  banner: { js: '/* with preact (MIT) and htm (Apache-2.0) */' },
  logLevel: 'warning'
})
await copyFile('page/index.html', 'dist/inspector/page/index.html')
