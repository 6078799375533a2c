import { once } from 'node:events'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import t from 'tap'
import ts from 'typescript'
import { codeBlocks, readDocument } from './support/docs.ts'
import { SECRET, sign, thin } from './support/deliveries.ts'
import { environment, spawnProgram } from './support/program.mjs'

t.test('the first example of the README receives a delivery over a socket', async t => {
  const { code } = codeBlocks(readDocument('README.md')).find(({ language }) => language === 'ts')!
  const adapted = code.replace('port: 3000', 'port: 0')
  t.not(adapted, code, 'the port was adapted')
  const { outputText } = ts.transpileModule(adapted, {
    compilerOptions: { target: ts.ScriptTarget.ES2023, module: ts.ModuleKind.ESNext }
  })
  // Within the package, so that its name leads to what is published: `exports`, dist/.
  const file = join(t.testdir({ 'readme.mjs': outputText }), 'readme.mjs')
  const child = spawnProgram([file], {
    env: { ...environment, OPENAI_WEBHOOK_SECRET: SECRET },
    stdio: ['ignore', 'pipe', 'pipe']
  })
  const exited = once(child, 'exit')
  t.teardown(async () => {
    child.kill()
    await exited
  })

  const lines: Array<Record<string, unknown>> = []
  const waiting = new Set<() => void>()
  let errorOutput = ''
  let ended = false
  child.stderr.on('data', chunk => { errorOutput += String(chunk) })
  const output = createInterface(child.stdout)
  const changed = (): void => { for (const look of waiting) look() }
  output.on('line', line => {
    lines.push(JSON.parse(line) as Record<string, unknown>)
    changed()
  })
  output.on('close', () => {
    ended = true
    changed()
  })

  function logged (wanted: RegExp): Promise<Record<string, unknown>> {
    return new Promise((resolve, reject) => {
      const look = (): void => {
        const found = lines.find(({ msg }) => wanted.test(String(msg)))
        if (found === undefined && !ended) return
        waiting.delete(look)
        if (found === undefined) reject(new Error(`no log line ${String(wanted)}: ${errorOutput}`))
        else resolve(found)
      }
      waiting.add(look)
      look()
    })
  }

  const listening = await logged(/^Server listening at http/)
  const origin = /http:\S+/.exec(String(listening['msg']))![0]
  const { headers, body } = sign(thin('batch.failed', { id: 'batch_1' }), { webhookId: 'wh_readme' })
  const response = await fetch(`${origin}/webhooks/openai`, { method: 'POST', headers, body })
  t.equal(response.status, 200)
  t.equal(await response.text(), '{"received":true}')
  t.match(await logged(/^batch failed$/), { batch: 'batch_1', webhookId: 'wh_readme', eventType: 'batch.failed' })

  const forged = await fetch(`${origin}/webhooks/openai`, { method: 'POST', headers, body: Buffer.from('{}') })
  t.equal(forged.status, 401)
  t.match(await forged.json(), { code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE' })
})
