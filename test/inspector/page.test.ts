import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import type { AddressInfo } from 'node:net'
import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import Database from 'libsql'
import type { Browser, Page } from 'playwright-core'
import t from 'tap'
import openaiWebhook from '../../lib/index.ts'
import type { OpenAIWebhookOptions } from '../../lib/index.ts'
import inspector from '../../lib/inspector/index.ts'
import type { InspectorOptions } from '../../lib/inspector/index.ts'
import { durable } from '../../lib/sqlite/index.ts'
import { SECRET, post, sign, thin } from '../support/deliveries.ts'
import { chromiumMissing, openBrowser } from '../support/browser.ts'
import { journalOf } from '../support/inspector.ts'
import { long } from '../support/size.ts'

type Teardown = { teardown: (fn: () => unknown) => void }

const axe = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8')

async function serve (t: Teardown, options: OpenAIWebhookOptions = {}, page: InspectorOptions = {}): Promise<FastifyInstance> {
  const app = Fastify() as FastifyInstance
  t.teardown(() => app.close())
  await app.register(openaiWebhook, { secret: SECRET, ...options })
  await app.register(inspector, page)
  return app
}

async function listen (app: FastifyInstance): Promise<string> {
  await app.listen({ port: 0, host: '127.0.0.1' })
  return `http://127.0.0.1:${(app.server.address() as AddressInfo).port}`
}

/** Errors in the page's script, requests to elsewhere, dialogs that a payload has opened. */
const faults: string[] = []

/** Opens the page, and notes what must not happen in it. */
async function open (browser: Browser, origin: string, options: Parameters<Browser['newPage']>[0] = {}): Promise<Page> {
  const page = await browser.newPage({ viewport: { width: 1280, height: 900 }, ...options })
  page.on('pageerror', error => faults.push(String(error)))
  page.on('dialog', dialog => { faults.push(`dialog ${dialog.message()}`); dialog.dismiss().catch(() => {}) })
  page.on('console', message => { if (/Content Security Policy|Refused to/.test(message.text())) faults.push(message.text()) })
  page.on('request', request => { if (!request.url().startsWith(`${origin}/openai-webhook`) && !request.url().startsWith('data:')) faults.push(`request to ${request.url()}`) })
  await page.goto(`${origin}/openai-webhook`)
  return page
}

const rows = (page: Page, name?: string | RegExp) => page.locator('tbody').getByRole('row', name === undefined ? {} : { name })
const button = (page: Page, name: string) => page.getByRole('button', { name, exact: true })

/** What axe-core finds serious, in the page as it is. */
async function serious (page: Page): Promise<string[]> {
  await page.evaluate(axe)
  return await page.evaluate(async () => {
    const { violations } = await (globalThis as unknown as { axe: { run: () => Promise<{ violations: Array<{ id: string, impact: string, nodes: Array<{ html: string }> }> }> } }).axe.run()
    return violations.filter(({ impact }) => impact === 'serious' || impact === 'critical').map(({ id, nodes }) => `${id}: ${nodes[0]!.html}`)
  })
}

t.test('in a browser', { skip: chromiumMissing }, async t => {
  const browser = await openBrowser(t)

  t.test('an empty page says what to do; a sample that is sent from it runs the handler and shows in the list', async t => {
    const app = await serve(t)
    const got: unknown[] = []
    app.openaiWebhook.onAny(({ type, data }) => { got.push([type, data]) })
    const page = await open(browser, await listen(app))
    await page.getByRole('heading', { name: 'Nothing yet' }).waitFor()
    t.same(await serious(page), [])
    await button(page, 'Send a sample').click()
    await page.getByLabel('Sample of').selectOption('batch.completed')
    const text = page.getByLabel('Event')
    // Not waitForFunction: after its first try it evaluates text in the page, which the page's own policy forbids.
    while (!(await text.inputValue()).includes('batch.completed')) await page.waitForTimeout(10)
    await text.fill((await text.inputValue()).replace(/"batch_\w+"/, '"batch_by_hand"'))
    t.same(await serious(page), [])
    await button(page, 'Deliver').click()
    await rows(page, /batch\.completed.*processed.*200.*batch_by_hand/).waitFor()
    t.same(got, [['batch.completed', { id: 'batch_by_hand' }]])
    await page.getByText('answered 200').waitFor()
  })

  t.test('the list fills as deliveries come; it filters, and pauses', async t => {
    const app = await serve(t)
    const origin = await listen(app)
    const page = await open(browser, origin)
    await page.getByRole('searchbox').waitFor()
    for (const type of ['batch.completed', 'batch.failed', 'response.completed']) await post(app, sign(thin(type)))
    await post(app, sign(thin('batch.failed', { id: 'batch_needle' })))
    await post(app, { ...sign(thin('batch.failed')), body: Buffer.from('{}') })
    await rows(page).nth(4).waitFor()
    t.match(await rows(page).first().innerText(), /refused[^]*401/, 'the newest first')
    await page.getByRole('searchbox').fill('needle')
    await rows(page).nth(1).waitFor({ state: 'detached' })
    t.match(await rows(page).allInnerTexts(), [/batch_needle/])
    await page.getByRole('searchbox').fill('nothing has this')
    await button(page, 'Clear the filter').click()
    await page.getByLabel('State').selectOption('refused')
    await rows(page).nth(1).waitFor({ state: 'detached' })
    await page.getByLabel('State').selectOption('')
    await page.getByLabel('Type').selectOption('response.completed')
    await rows(page).nth(1).waitFor({ state: 'detached' })
    await page.getByLabel('Type').selectOption('')
    await rows(page).nth(4).waitFor()
    await button(page, 'Pause').click()
    await post(app, sign(thin('batch.cancelled')))
    await page.getByText('1 delivery has come since').waitFor()
    t.equal(await rows(page).count(), 5)
    await button(page, 'Resume').click()
    await rows(page, /batch\.cancelled/).waitFor()
  })

  t.test('a refused one shows its cause, a failed one its stack; delivered again, its handler runs again', async t => {
    const app = await serve(t)
    let runs = 0
    app.openaiWebhook.on('batch.failed', function openBucket () { if (++runs === 1) throw new TypeError('the bucket is gone') }, { name: 'refund' })
    const { headers, body } = sign(thin('batch.failed'))
    await post(app, { headers, body: Buffer.concat([body, Buffer.from('\n')]) })
    const page = await open(browser, await listen(app))
    await rows(page, /refused/).click()
    const detail = page.getByRole('complementary')
    await detail.getByText('FST_OPENAI_WEBHOOK_INVALID_SIGNATURE').waitFor()
    await detail.getByText(/a newline.*with that undone the signature matches/i).waitFor()
    await detail.getByText('What to change').waitFor()
    t.equal(await button(page, 'Deliver again').count(), 0, 'anybody may have sent it')
    t.same(await serious(page), [])
    await button(page, 'Bytes').click()
    await detail.getByText('7b 22 69 64').waitFor()

    await post(app, { headers, body })
    await rows(page, /failed.*500/).click()
    await detail.getByText(/TypeError: the bucket is gone\s+at .*openBucket/).waitFor()
    await detail.getByText('refund').first().waitFor()
    t.same(await serious(page), [])
    await button(page, 'Deliver again').click()
    await page.getByText('its handlers run again').waitFor()
    t.equal(runs, 1, 'it asks first')
    await button(page, 'Cancel').click()
    await button(page, 'Deliver again').click()
    await button(page, 'Deliver').click()
    await rows(page, /batch\.failed.*again.*processed.*200/).waitFor()
    t.equal(runs, 2)
    await page.waitForURL(/#\/3$/)
    await detail.getByText(/^from this page/).waitFor()
    await button(page, 'Close').click()
    await detail.waitFor({ state: 'detached' })
  })

  t.test('an edit that is not taken stays in its dialog, with why; one that is taken opens the new delivery', async t => {
    const app = await serve(t)
    let broken = false
    app.openaiWebhook.on('batch.failed', () => { if (broken) throw new Error('the bucket is gone') })
    await post(app, sign(thin('batch.failed')))
    const page = await open(browser, await listen(app))
    await rows(page).first().click()
    await button(page, 'Edit and deliver').click()
    const dialog = page.getByRole('dialog')
    await page.getByLabel('Event').fill('{ "type": ')
    await button(page, 'Deliver').click()
    t.match(await dialog.getByRole('alert').innerText(), /^Answered 400 INVALID_BODY: [^{}"]+ Show it$/)
    t.equal(await page.getByLabel('Event').inputValue(), '{ "type": ')
    await rows(page, /again.*refused.*400/).waitFor()
    t.same(await serious(page), [])
    broken = true
    await page.getByLabel('Event').fill(JSON.stringify(thin('batch.failed', { id: 'batch_edited' })))
    await button(page, 'Deliver').click()
    await dialog.getByText('Answered 500 HANDLER_FAILED').waitFor()
    await dialog.getByRole('link', { name: 'Show it' }).click()
    await dialog.waitFor({ state: 'detached' })
    const detail = page.getByRole('complementary')
    await detail.getByText('batch_edited').first().waitFor()
    broken = false
    await button(page, 'Edit and deliver').click()
    await button(page, 'Deliver').click()
    await page.waitForURL(/#\/4$/)
    await rows(page, /again.*processed/).waitFor()
    t.equal(await rows(page, /again/).count(), 3)
  })

  long(t, 'to a route with tenants nothing is sent before its URL and its tenant are filled in', {}, async t => {
    const app = await serve(t, { path: false })
    app.openaiWebhook.route({
      url: '/webhooks/openai/:project',
      tenant: { of: request => (request.params as { project: string }).project, secret: name => name === 'acme' ? SECRET : undefined }
    })
    const page = await open(browser, await listen(app))
    await button(page, 'Send a sample').click()
    const dialog = page.getByRole('dialog')
    const told = async (text: string): Promise<void> => {
      await button(page, 'Deliver').click()
      await dialog.getByRole('alert').getByText(text).waitFor()
    }
    await page.getByLabel('Tenant').fill('acme')
    await told('fill in :project')
    await page.getByLabel('Tenant').fill('')
    await page.getByLabel('URL').fill('/webhooks/openai/acme')
    await told('fill in Tenant')
    t.equal(await rows(page).count(), 0)
    await page.getByLabel('Tenant').fill('acme')
    await button(page, 'Deliver').click()
    await rows(page, /processed.*acme/).waitFor()
    await post(app, sign(thin('batch.failed')), '/webhooks/openai/nobody')
    await rows(page, /401 UNKNOWN_TENANT/).click()
    await page.getByRole('complementary').getByText(/^401 INVALID_SIGNATURE, lest strangers/).waitFor()
  })

  long(t, 'a cause that is not proved is said to be so once; a sender that was told 503 is not told to have been refused', {}, async t => {
    const app = await serve(t, { deadline: 20 })
    let end = (): void => {}
    app.openaiWebhook.on('batch.failed', async () => await new Promise<void>(resolve => { end = resolve }))
    const page = await open(browser, await listen(app))
    await post(app, sign(thin('batch.completed'), { secret: `whsec_${Buffer.alloc(32, 'o').toString('base64')}` }))
    await rows(page, /refused/).click()
    const detail = page.getByRole('complementary')
    await detail.getByText('Why it was refused').waitFor()
    const text = await detail.innerText()
    t.equal(text.match(/not proved/g)?.length, 1)
    t.equal(text.match(/likel/gi)?.length, 1)
    t.match(text, /What to change\s+where the sender is OpenAI: compare OPENAI_WEBHOOK_SECRET/)
    t.same(await serious(page), [])
    await post(app, sign(thin('batch.failed')))
    end()
    await rows(page, /processed/).click()
    await detail.getByText('Why the sender was told 503').waitFor()
    t.equal(await detail.getByText('Why it was refused').count(), 0)
  })

  t.test('copied as curl, as a command, as a test', async t => {
    const app = await serve(t)
    await post(app, sign(thin('batch.failed', { id: "it's" })))
    const origin = await listen(app)
    const page = await open(browser, origin)
    await page.context().grantPermissions(['clipboard-read', 'clipboard-write'], { origin })
    await rows(page).first().click()
    const copied = async (name: string): Promise<string> => {
      await button(page, name).click()
      await page.getByText('Copied as').waitFor()
      return await page.evaluate<string>('navigator.clipboard.readText()')
    }
    t.match(await copied('Copy as curl'), /^body='\{.*it'\\''s.*'\n[^]*curl -i 'http:\/\/127\.0\.0\.1:\d+\/webhooks\/openai'/)
    t.match(await copied('Copy as trigger'), /^npx fastify-openai-webhook trigger 'batch\.failed' --url 'http.*\n {2}--data 'data\.id=it'\\''s'\n$/)
    t.match(await copied('Copy as test'), /deliver\(app, \{[^]*"batch\.failed"[^]*assert\.equal\(response\.statusCode, 200\)/)
  })

  t.test('dead letters: looked at, and requeued until none is left', async t => {
    const app = await serve(t, { runner: durable(new Database(':memory:'), { attempts: 1, backoff: 1 }) })
    let broken = true
    app.openaiWebhook.onAny(() => { if (broken) throw new Error('the bucket is gone') })
    for (const type of ['batch.failed', 'batch.failed', 'batch.completed']) await post(app, sign(thin(type)))
    while (await app.openaiWebhook.deadLetters.count() < 3) await new Promise(resolve => setImmediate(resolve))
    const page = await open(browser, await listen(app))
    await page.getByRole('heading', { name: '3 dead deliveries' }).waitFor()
    t.same(await serious(page), [])
    broken = false
    await button(page, 'Requeue').first().click()
    await page.getByRole('heading', { name: '2 dead deliveries' }).waitFor()
    await button(page, 'All back to the queue').click()
    await button(page, 'Yes, all').click()
    await page.getByRole('heading', { name: 'dead' }).waitFor({ state: 'detached' })
    await rows(page, /processed/).nth(2).waitFor()
    t.equal(await app.openaiWebhook.deadLetters.count(), 0)
  })

  t.test('a payload is text, in every field', async t => {
    const app = await serve(t)
    const evil = '<img src=x onerror=alert(1)>"\'><script>alert(2)</script>'
    app.openaiWebhook.onAny(() => { throw new Error(evil) })
    await post(app, sign({ id: evil, object: evil, created_at: evil, type: evil, data: { id: evil, [evil]: [evil, { a: evil }] } }))
    const signed = sign(thin('batch.failed'))
    await post(app, { headers: { ...signed.headers, 'webhook-id': evil, 'x-evil': evil }, body: Buffer.from(evil) })
    const page = await open(browser, await listen(app))
    for (let i = 0; i < 2; i++) {
      await rows(page).nth(i).click()
      await page.getByRole('complementary').getByText('<img src=x onerror').first().waitFor()
      for (const name of ['Tree', 'Text', 'Bytes']) if (await button(page, name).count() > 0) await button(page, name).click()
      t.equal(await page.locator('img, body script').count(), 0)
    }
    await page.getByRole('searchbox').fill('img')
  })

  t.test('another page cannot press its buttons, nor read it', async t => {
    const app = await serve(t)
    let runs = 0
    app.openaiWebhook.onAny(() => { runs++ })
    await post(app, sign(thin('batch.failed')))
    const origin = await listen(app)
    const foreign = Fastify()
    t.teardown(() => foreign.close())
    foreign.get('/', async (_request, reply) => await reply.type('text/html').send('<h1>foreign</h1>'))
    await foreign.listen({ port: 0, host: '127.0.0.1' })
    const page = await browser.newPage()
    await page.goto(`http://localhost:${(foreign.server.address() as AddressInfo).port}`)
    const answers: number[] = []
    page.on('response', response => { if (response.request().method() === 'POST') answers.push(response.status()) })
    await page.evaluate(async origin => {
      const url = `${origin}/openai-webhook/api/again`
      await fetch(url, { method: 'POST', mode: 'no-cors', body: '{"id":1}' }).catch(() => {})
      await fetch(url, { method: 'POST', headers: { 'content-type': 'application/json' }, body: '{"id":1}' }).catch(() => {})
    }, origin)
    t.equal(runs, 1)
    t.equal(await page.evaluate(async origin => await fetch(`${origin}/openai-webhook/api/deliveries/1`).then(() => 'read', () => 'not read'), origin), 'not read')
    t.ok(answers.every(status => status >= 400))
  })

  t.test('where it is read-only, it says so, and there is nothing to press', async t => {
    const app = await serve(t, {}, { readOnly: true })
    await post(app, sign(thin('batch.failed')))
    const page = await open(browser, await listen(app))
    await rows(page).first().click()
    await button(page, 'Copy as curl').waitFor()
    for (const name of ['Send a sample', 'Deliver again', 'Edit and deliver']) t.equal(await button(page, name).count(), 0, name)
    t.match(await page.getByRole('banner').getByText('read-only', { exact: true }).getAttribute('title'), /readOnly: false/)
    t.same(await serious(page), [])
    const acting = await open(browser, await listen(await serve(t)))
    await button(acting, 'Send a sample').waitFor()
    t.equal(await acting.getByText('read-only').count(), 0)
  })

  long(t, 'many deliveries do not grow the tab, and an app that begins anew is found again', {}, async t => {
    const app = await serve(t)
    const origin = await listen(app)
    const page = await open(browser, origin)
    await page.getByRole('searchbox').waitFor()
    const session = await page.context().newCDPSession(page)
    await session.send('Performance.enable')
    const measure = async (): Promise<{ heap: number, nodes: number }> => {
      await session.send('HeapProfiler.collectGarbage')
      const { metrics } = await session.send('Performance.getMetrics')
      const of = (name: string): number => metrics.find(metric => metric.name === name)!.value
      return { heap: of('JSHeapUsedSize'), nodes: of('Nodes') }
    }
    const send = async (count: number): Promise<void> => {
      for (let i = 0; i < count; i++) {
        await post(app, sign(thin('batch.failed', { id: `batch_${i}` })))
        if (i % 50 === 0) await new Promise(resolve => setTimeout(resolve, 5))
      }
      await rows(page, new RegExp(`batch_${count - 1}`)).waitFor()
    }
    await send(600)
    const before = await measure()
    await send(10_000)
    const after = await measure()
    t.ok(after.heap < before.heap + 3_000_000, `${before.heap} → ${after.heap} bytes`)
    t.ok(after.nodes < before.nodes * 1.5, `${before.nodes} → ${after.nodes} nodes`)
    t.equal(await rows(page).count(), 100)
    await button(page, `Show more of ${journalOf(app).deliveries.max}`).click()
    await rows(page).nth(150).waitFor()
  })

  long(t, 'no column is cut off at any width, and no type loses its end', {}, async t => {
    const app = await serve(t)
    app.openaiWebhook.route({
      url: '/a-longer-way-to/the-webhooks/of-openai/:project',
      tenant: { of: request => (request.params as { project: string }).project, secret: () => SECRET }
    })
    const types = ['response.completed', 'response.cancelled', 'fine_tuning.job.succeeded', 'realtime.call.incoming']
    for (const type of types) await post(app, sign(thin(type, { id: `res_${'x'.repeat(60)}` })), '/a-longer-way-to/the-webhooks/of-openai/a-tenant-with-a-long-name')
    await post(app, sign(thin('batch.failed'), { timestamp: 1 }))
    const page = await open(browser, await listen(app))
    await rows(page).nth(types.length).waitFor()
    const isWhole = async (): Promise<[boolean, boolean]> => await page.evaluate(`[
      document.querySelector('main').scrollWidth <= document.querySelector('main').clientWidth,
      [...document.querySelectorAll('th, td:nth-child(-n + 3), td.endpoint, td.number')].every(cell => cell.scrollWidth <= cell.clientWidth)
    ]`)
    for (const isOpen of [false, true]) {
      if (isOpen) {
        await rows(page, /response\.completed/).click()
        await page.getByRole('complementary').getByText('Headers').waitFor()
      }
      for (const width of [360, 480, 700, 821, 1_000, 1_101, 1_280, 1_920]) {
        await page.setViewportSize({ width, height: 900 })
        t.same(await isWhole(), [true, true], `${width} px${isOpen ? ', with a delivery' : ''}`)
        t.equal(await page.evaluate('document.documentElement.scrollWidth'), width)
      }
    }
    await page.keyboard.press('Escape')
    await page.setViewportSize({ width: 1_280, height: 900 })
    t.ok(await page.getByRole('columnheader', { name: 'ms' }).isVisible())
  })

  t.test('by keyboard, narrow, and dark', async t => {
    const app = await serve(t)
    for (const type of ['batch.failed', 'batch.completed']) await post(app, sign(thin(type)))
    const page = await open(browser, await listen(app), { viewport: { width: 360, height: 740 }, colorScheme: 'dark' })
    await rows(page).nth(1).waitFor()
    t.same(await serious(page), [])
    t.equal(await page.evaluate('document.documentElement.scrollWidth'), 360, 'nothing sticks out')
    await page.keyboard.press('/')
    t.equal(await page.evaluate('document.activeElement.type'), 'search')
    await rows(page).first().getByRole('link').focus()
    await page.keyboard.press('ArrowDown')
    await page.keyboard.press('Enter')
    await page.getByRole('complementary').getByRole('heading', { name: 'batch.failed' }).waitFor()
    t.equal(await page.evaluate('document.documentElement.scrollWidth'), 360, 'nothing sticks out')
    t.same(await serious(page), [])
    await page.keyboard.press('Escape')
    await rows(page).first().waitFor()
  })

  t.test('what is closed gives the focus back to what opened it', async t => {
    const app = await serve(t)
    for (const type of ['batch.failed', 'batch.completed']) await post(app, sign(thin(type)))
    const page = await open(browser, await listen(app))
    const focused = async (): Promise<string> => await page.evaluate<string>('document.activeElement.tagName + " " + document.activeElement.textContent')
    const detail = page.getByRole('complementary')
    for (const close of [async () => await page.keyboard.press('Escape'), async () => await button(page, 'Close').click(), async () => { await page.goBack() }]) {
      await rows(page, /batch\.failed/).getByRole('link').focus()
      await page.keyboard.press('Enter')
      await button(page, 'Deliver again').waitFor()
      await close()
      await detail.waitFor({ state: 'detached' })
      t.equal(await focused(), 'A batch.failed')
    }
    await rows(page, /batch\.failed/).click()
    for (const close of [async () => await page.keyboard.press('Escape'), async () => await button(page, 'Cancel').click()]) {
      await button(page, 'Deliver again').click()
      await button(page, 'Deliver').waitFor()
      await close()
      await button(page, 'Deliver').waitFor({ state: 'detached' })
      t.equal(await focused(), 'BUTTON Deliver again')
    }
    await page.getByRole('searchbox').fill('completed')
    await rows(page, /batch\.failed/).waitFor({ state: 'detached' })
    await button(page, 'Deliver again').focus()
    await page.keyboard.press('Escape')
    await detail.waitFor({ state: 'detached' })
    t.match(await focused(), /^MAIN/, 'its row is not there any more')
  })

  t.test('in none of them an error, a request to elsewhere, or a payload that ran', async t => { t.same(faults, []) })
})
