import { readFileSync, readdirSync } from 'node:fs'
import { dirname, join, normalize } from 'node:path'
import t from 'tap'

/**
 * The rooms of lib/, from the top down: a file imports from its own layer or from those below, types included. A room is a
 * folder or a file; what stands in one line is one layer, whose rooms do not know each other.
 */
const LAYERS = [
  ['index.ts', 'cli'],
  ['plugin.ts', 'inspector', 'resources'],
  ['scope.ts'],
  ['routes'],
  ['delivery'],
  ['failures.ts', 'otel.ts', 'testing'],
  ['metrics.ts'],
  ['metrics', 'pipeline'],
  ['observation.ts'],
  ['channels.ts', 'diagnose.ts', 'api.ts'],
  ['diagnose', 'options.ts', 'dead-letters.ts', 'registry.ts', 'sqlite', 'postgres'],
  ['runners', 'inbox'],
  ['handlers.ts', 'refusal-log.ts'],
  ['stores', 'request.ts', 'verifiers'],
  ['events', 'checks.ts', 'coded.ts', 'deadline.ts', 'handler-name.ts', 'log.ts'],
  ['errors.ts', 'grouped.ts', 'nearest.ts', 'pruning.ts', 'maybe-promise.ts', 'typebox.ts'],
  ['async-context.ts', 'within.ts']
]

const files = readdirSync('lib', { recursive: true, encoding: 'utf8' }).filter(file => file.endsWith('.ts'))
const layerOf = (room: string): number => LAYERS.findIndex(rooms => rooms.includes(room))
const roomOf = (file: string): string => file.split('/')[0]!

/** Type imports and imports at run time are imports too. */
function importsOf (file: string): string[] {
  const text = readFileSync(join('lib', file), 'utf8')
  return [...text.matchAll(/(?:^import |\bfrom |\bimport\()'(\.[^']+)'/gm)].map(([, path]) => normalize(join(dirname(file), path!)))
}

t.test('every file has a layer, and every room a file', async t => {
  t.same(files.filter(file => layerOf(roomOf(file)) === -1), [])
  const rooms = new Set(files.map(roomOf))
  t.same(LAYERS.flat().filter(room => !rooms.has(room)), [])
})

t.test('imports run down', async t => {
  const up = files.flatMap(file => importsOf(file)
    .filter(imported => roomOf(imported) !== roomOf(file) && layerOf(roomOf(imported)) <= layerOf(roomOf(file)))
    .map(imported => `${file} imports ${imported}`))
  t.same(up, [])
})

t.test('no circle, within a room either', async t => {
  const circles: string[] = []
  const known = new Map<string, 'open' | 'done'>()
  function visit (file: string, path: readonly string[]): void {
    if (known.get(file) === 'done') return
    if (known.get(file) === 'open') {
      circles.push([...path.slice(path.indexOf(file)), file].join(' → '))
      return
    }
    known.set(file, 'open')
    for (const imported of importsOf(file)) visit(imported, [...path, file])
    known.set(file, 'done')
  }
  for (const file of files) visit(file, [])
  t.same(circles, [])
})

t.test('what stands behind a sub-path is not loaded with the root', async t => {
  const loaded = new Set<string>()
  function load (file: string): void {
    if (loaded.has(file)) return
    loaded.add(file)
    const text = readFileSync(join('lib', file), 'utf8')
    const atRunTime = [...text.matchAll(/^(?:import|export) (?!type )[\w*{}\s,]+ from '(\.[^']+)'/gm)].map(([, path]) => normalize(join(dirname(file), path!)))
    atRunTime.forEach(load)
  }
  load('plugin.ts')
  t.same([...loaded].filter(file => ['sqlite', 'cli', 'testing', 'metrics', 'diagnose', 'resources'].includes(roomOf(file)) || /redis|bullmq|pgboss|otel|metrics|openapi/.test(file)), [])
})
