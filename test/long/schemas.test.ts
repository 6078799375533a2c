import { execFile } from 'node:child_process'
import { mkdir, writeFile } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { promisify } from 'node:util'
import t from 'tap'
import { SECRET } from '../support/deliveries.ts'
import { environment as env } from '../support/program.mjs'

const run = promisify(execFile)
const root = resolve(import.meta.dirname, '../..')

// What a user would run has nothing of the test runner's loaders in its environment.

interface Library {
  readonly install: string
  readonly imports: string
  /** An order, with its type, an id, whole cents and maybe a note. */
  readonly schema: string
}

const LIBRARIES: Record<string, Library> = {
  'TypeBox 0.34': {
    install: '@sinclair/typebox@0.34',
    imports: "import { Type } from '@sinclair/typebox'",
    schema: "Type.Object({ type: Type.Literal('acme.order.paid'), data: Type.Object({ id: Type.String(), cents: Type.Integer(), note: Type.Optional(Type.String()) }) })"
  },
  'TypeBox 1.x': {
    install: 'typebox@1',
    imports: "import Type from 'typebox'",
    schema: "Type.Object({ type: Type.Literal('acme.order.paid'), data: Type.Object({ id: Type.String(), cents: Type.Integer(), note: Type.Optional(Type.String()) }) })"
  },
  Zod: {
    install: 'zod@4',
    imports: "import * as z from 'zod'",
    schema: "z.object({ type: z.literal('acme.order.paid'), data: z.object({ id: z.string(), cents: z.int(), note: z.string().optional() }) })"
  },
  Valibot: {
    install: 'valibot@1',
    imports: "import * as v from 'valibot'",
    schema: "v.object({ type: v.literal('acme.order.paid'), data: v.object({ id: v.string(), cents: v.pipe(v.number(), v.integer()), note: v.optional(v.string()) }) })"
  },
  ArkType: {
    install: 'arktype@2',
    imports: "import { type } from 'arktype'",
    schema: 'type({ type: "\'acme.order.paid\'", data: { id: \'string\', cents: \'number.integer\', \'note?\': \'string\' } })'
  }
}

const program = ({ imports, schema }: Library): string => `
${imports}
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import type { EventsOf } from 'fastify-openai-webhook'
import { deliver } from 'fastify-openai-webhook/testing'

const events = { 'acme.order.paid': ${schema} }

declare module 'fastify-openai-webhook' {
  interface OpenAIWebhookEvents extends EventsOf<typeof events> {}
}

const secret = '${SECRET}'
const app = Fastify()
await app.register(openaiWebhook, { secret, events })
app.openaiWebhook
  .on('acme.order.paid', event => {
    const cents: number = event.data.cents
    const note: string | undefined = event.data.note
    // @ts-expect-error a field that the schema does not have
    event.data.euros
    console.log(event.type, cents, note)
  })
  .on('acme.*', event => { const type: 'acme.order.paid' = event.type; console.log(type) })
  .on('batch.failed', event => { const id: string = event.data.id; console.log(id) })
for (const cents of [100, 'a hundred']) {
  const response = await deliver(app, JSON.stringify({ type: 'acme.order.paid', data: { id: 'o_1', cents, added: true } }), { secret })
  console.log(response.statusCode, cents === 100 ? response.body : /data.cents/.test(response.body) && !/hundred/.test(response.body))
}
await app.close()
`

/** As CommonJS, for which a library may have declarations of its own. */
const commonjs = ({ imports, schema }: Library): string => `
${imports}
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import type { EventsOf } from 'fastify-openai-webhook'

const events = { 'acme.order.paid': ${schema} }
type Order = EventsOf<typeof events>['acme.order.paid']
export const centsOf = (order: Order): number => order.data.cents
// @ts-expect-error a field that the schema does not have
export const eurosOf = (order: Order): number => order.data.euros
export const app = Fastify().register(openaiWebhook, { events })
`

t.test('a consumer with each schema library compiles, and its events are checked', async t => {
  const dir = t.testdir()
  const { stdout: packed } = await run('npm', ['pack', '--ignore-scripts', '--json', '--pack-destination', dir], { cwd: root, env })
  const [{ filename }] = JSON.parse(packed) as [{ filename: string }]
  for (const [name, library] of Object.entries(LIBRARIES)) {
    await t.test(name, async t => {
      const cwd = join(dir, name.replaceAll(/[ .]/g, '-'))
      await mkdir(cwd)
      await writeFile(join(cwd, 'package.json'), JSON.stringify({ name: 'consumer', private: true, type: 'module' }))
      await writeFile(join(cwd, 'tsconfig.json'), JSON.stringify({
        // ArkType's own declarations want the newest library.
        compilerOptions: { module: 'NodeNext', target: 'ES2022', strict: true, skipLibCheck: name === 'ArkType', types: ['node'], typeRoots: [join(root, 'node_modules/@types')] },
        files: ['app.ts', 'commonjs.cts']
      }))
      await writeFile(join(cwd, 'app.ts'), program(library))
      await writeFile(join(cwd, 'commonjs.cts'), commonjs(library))
      await run('npm', ['install', '--no-audit', '--no-fund', '--prefer-offline', join(dir, filename), 'fastify@5', library.install], { cwd, env })
      await run(process.execPath, [join(root, 'node_modules/typescript-7/lib/tsc.js'), '-p', '.'], { cwd, env })
      const { stdout } = await run(process.execPath, ['app.js'], { cwd, env })
      t.same(stdout.trim().split('\n'), ['acme.order.paid 100 undefined', 'acme.order.paid', '200 {"received":true}', '400 true'])
    })
  }
})
