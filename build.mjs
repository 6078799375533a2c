// npm run build: bundles the files of lib/ that the package's `exports` and `bin` name.
import { copyFile, rm } from 'node:fs/promises'
import { readFileSync } from 'node:fs'
import { build } from 'esbuild'

const { bin, dependencies, exports, peerDependencies } = JSON.parse(readFileSync('package.json', 'utf8'))
const built = [...Object.values(exports).map(target => target.default), ...Object.values(bin)].filter(file => file !== undefined)

await rm('dist', { recursive: true, force: true })
await build({
  // lib/events/index.ts is not exported, but docs/generate.mjs imports it.
  entryPoints: [...new Set(built.map(file => file.replace('./dist/', 'lib/').replace(/js$/, 'ts'))), 'lib/events/index.ts'],
  outdir: 'dist',
  outbase: 'lib',
  bundle: true,
  splitting: true,
  chunkNames: 'shared/[name]-[hash]',
  platform: 'node',
  format: 'esm',
  target: 'node20',
  // The user's copy compiles the user's schemas.
  plugins: [{
    name: 'users-typebox',
    setup: ({ onResolve }) => onResolve({ filter: /^@sinclair\/typebox\/compiler$/ }, ({ path, kind }) => kind === 'dynamic-import' ? { path, external: true } : undefined)
  }],
  external: [...Object.keys(dependencies), ...Object.keys(peerDependencies)].filter(name => name !== '@sinclair/typebox'),
  logLevel: 'warning'
})

// The inspector's page: one HTML file, one script and one style sheet.
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
