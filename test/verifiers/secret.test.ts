import { createHmac, randomBytes } from 'node:crypto'
import { Writable } from 'node:stream'
import { inspect } from 'node:util'
import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import type { Test } from 'tap'
import { Webhook } from 'standardwebhooks'
import openaiWebhook, { standardWebhooks, xOpenAISignature } from '../../lib/index.ts'
import type { OpenAIWebhookOptions, Secret, Verifier } from '../../lib/index.ts'
import { build, post, SECRET, sign, stoppedClock, thin } from '../support/deliveries.ts'
import type { Signed } from '../support/deliveries.ts'

const OTHER = `whsec_${randomBytes(32).toString('base64')}`
const TEXT = 'a-plain-text-secret-of-mine'
const URL = '/webhooks/openai'
const MINUTE = 60_000

function environment (t: Test, value: string | undefined): void {
  const before = process.env['OPENAI_WEBHOOK_SECRET']
  const set = (text: string | undefined): void => {
    if (text === undefined) delete process.env['OPENAI_WEBHOOK_SECRET']
    else process.env['OPENAI_WEBHOOK_SECRET'] = text
  }
  set(value)
  t.teardown(() => set(before))
}

/** An app and the lines that it logs. */
function create (t: Test): { app: FastifyInstance, lines: string[] } {
  const lines: string[] = []
  const stream = new Writable({
    write (chunk: Buffer, _encoding, done) {
      lines.push(chunk.toString())
      done()
    }
  })
  const app = Fastify({ logger: { level: 'warn', stream } }) as FastifyInstance
  t.teardown(() => app.close())
  return { app, lines }
}

async function register (t: Test, options: OpenAIWebhookOptions): Promise<FastifyInstance> {
  const { app } = create(t)
  await app.register(openaiWebhook, options)
  return app
}

/** Signed with the secret's text, as OpenAI's SDKs verify a secret without `whsec_`. */
function signAsText (text: string): Signed {
  const signed = sign(thin('response.completed'))
  const date = new Date(Number(signed.headers['webhook-timestamp']) * 1000)
  signed.headers['webhook-signature'] = new Webhook(Buffer.from(text), { format: 'raw' }).sign(signed.headers['webhook-id']!, date, signed.body)
  return signed
}

/** Signed as the older guide says, under the secret's text. */
function signedByGuide (secret: string): Signed {
  const body = Buffer.from(JSON.stringify(thin('response.completed')))
  const timestamp = String(Math.floor(Date.now() / 1000))
  const signature = createHmac('sha256', secret).update(`${timestamp}.`).update(body).digest('hex')
  return { headers: { 'content-type': 'application/json', 'x-openai-timestamp': timestamp, 'x-openai-signature': signature }, body }
}

const signed = (secret = SECRET): Signed => sign(thin('response.completed'), { secret })

async function statuses (app: FastifyInstance, deliveries: Signed[], url = URL): Promise<number[]> {
  const answers = await Promise.all(deliveries.map(delivery => post(app, delivery, url)))
  return answers.map(({ statusCode }) => statusCode)
}

t.test('what a verifier of the user\'s own makes of a secret is bytes', async t => {
  const cases: Array<[keyBytes: () => unknown, message: RegExp]> = [
    [() => { throw new Error('no vault') }, /keyBytes failed/],
    [async () => Buffer.from('late'), /keyBytes to return the bytes of the key, got a value of type object/],
    [() => 'text', /got a value of type string/],
    [() => Buffer.from('no hex', 'hex'), /keyBytes to return the bytes of the key, got none/]
  ]
  for (const [keyBytes, message] of cases) {
    const verifier = Object.assign(() => ({ webhookId: 'wh_1', timestamp: 1 }), { keyBytes }) as unknown as Verifier
    await t.rejects(register(t, { secret: SECRET, verifier }), { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message })
  }
})

t.test('a secret function that does not answer keeps the app from starting, and the error names it', async t => {
  const app = Fastify({ pluginTimeout: 50 })
  t.teardown(() => app.close())
  await app.register(openaiWebhook, { secret: async () => await new Promise<string>(() => {}) })
  await t.rejects(async () => { await app.ready() }, { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message: 'the `secret` function took more than 40 ms' })
})

t.test('nobody signs with an empty key, whatever the verifier', async t => {
  for (const verifier of [standardWebhooks(), xOpenAISignature()]) {
    await t.rejects(register(t, { secret: 'whsec_', verifier }), { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message: /after "whsec_" in the signing secret, got nothing/ })
  }
})

t.test('every form of the secret', async t => {
  const forms: Record<string, { secret: Secret, accepts: Signed[], refuses: Signed[] }> = {
    string: { secret: SECRET, accepts: [signed()], refuses: [signed(OTHER)] },
    array: { secret: [OTHER, SECRET], accepts: [signed(), signed(OTHER)], refuses: [signAsText(TEXT)] },
    'function, at once': { secret: () => SECRET, accepts: [signed()], refuses: [signed(OTHER)] },
    'function, later': { secret: async () => SECRET, accepts: [signed()], refuses: [signed(OTHER)] },
    'function that returns an array': { secret: () => [OTHER, SECRET], accepts: [signed(), signed(OTHER)], refuses: [signAsText(TEXT)] },
    'function that resolves to an array': { secret: async () => [SECRET], accepts: [signed()], refuses: [signed(OTHER)] },
    'base64 without padding': { secret: SECRET.replace('=', ''), accepts: [signed()], refuses: [signed(OTHER)] },
    'text without "whsec_"': { secret: TEXT, accepts: [signAsText(TEXT)], refuses: [signed()] },
    'base64 without "whsec_" is text': {
      secret: SECRET.slice('whsec_'.length),
      accepts: [signAsText(SECRET.slice('whsec_'.length))],
      refuses: [signed()]
    },
    'text that is not ASCII': { secret: 'geheim-\u00fc\u{1f511}', accepts: [signAsText('geheim-\u00fc\u{1f511}')], refuses: [signed()] }
  }
  for (const [name, { secret, accepts, refuses }] of Object.entries(forms)) {
    const app = await register(t, { secret })
    t.same(await statuses(app, accepts), accepts.map(() => 200), `${name}: accepts what was signed with it`)
    t.same(await statuses(app, refuses), refuses.map(() => 401), `${name}: refuses what was not`)
  }
})

t.test('the environment', async t => {
  t.test('OPENAI_WEBHOOK_SECRET is the default', async t => {
    environment(t, SECRET)
    const app = await register(t, {})
    t.same(await statuses(app, [signed(), signed(OTHER)]), [200, 401])
  })

  t.test('the option goes first', async t => {
    environment(t, OTHER)
    const app = await register(t, { secret: SECRET })
    t.same(await statuses(app, [signed(), signed(OTHER)]), [200, 401])
  })

  t.test('neither is refused at boot', async t => {
    environment(t, undefined)
    await t.rejects(register(t, {}), { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message: /OPENAI_WEBHOOK_SECRET or the `secret` option, got neither/ })
  })

  t.test('an empty or wrong value is refused at boot', async t => {
    environment(t, '')
    await t.rejects(register(t, {}), { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message: /empty string: set OPENAI_WEBHOOK_SECRET/ })
    environment(t, `"${SECRET}"`)
    await t.rejects(register(t, {}), { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message: /white space or a quote/ })
  })
})

t.test('a secret without "whsec_" is warned of once', async t => {
  const { app, lines } = create(t)
  await app.register(openaiWebhook, { secret: async () => [TEXT, `${TEXT}-2`] })
  app.openaiWebhook.route({ url: '/second', secret: `${TEXT}-3` })
  await app.ready()
  await app.openaiWebhook.unwrap(...unwrappable(signAsText(`${TEXT}-4`)), { secret: `${TEXT}-4` })
  t.same(await statuses(app, [signAsText(TEXT), signAsText(`${TEXT}-2`)]), [200, 200])
  t.same(await statuses(app, [signAsText(`${TEXT}-3`)], '/second'), [200])
  t.equal(lines.length, 1)
  t.match(JSON.parse(lines[0]!), { level: 40, msg: /does not begin with "whsec_".*UTF-8 bytes/ })
  t.notOk(lines[0]!.includes(TEXT), 'without the secret')

  const quiet = create(t)
  await quiet.app.register(openaiWebhook, { secret: [SECRET, OTHER] })
  quiet.app.openaiWebhook.route({ url: '/guide', secret: TEXT, verifier: xOpenAISignature() })
  await quiet.app.ready()
  t.same(quiet.lines, [], 'nor where "whsec_" is there, or where the scheme takes any text')
})

function unwrappable ({ body, headers }: Signed): [Buffer, Record<string, string>] {
  return [body, headers]
}

const key = SECRET.slice('whsec_'.length)

/** What is in the place of a secret, and what the user is told. */
const BAD: Record<string, { secret: unknown, message: RegExp }> = {
  'an empty string': { secret: '', message: /empty string: set OPENAI_WEBHOOK_SECRET or the `secret` option to the whsec_… value/ },
  'an endpoint\'s id': { secret: 'whe_685c059ae39c8190', message: /got an endpoint's id \(whe_…\): copy the secret that was shown/ },
  'a prefix in upper case': { secret: `Whsec_${key}`, message: /expected the signing secret to begin with "whsec_" in lower case/ },
  'an API key': { secret: `sk-proj-${key}`, message: /got an API key \(sk-…\): copy the secret shown when the webhook endpoint was created/ },
  'the prefix alone': { secret: 'whsec_', message: /expected base64 after "whsec_".*copy it again whole/ },
  'characters that are not base64': { secret: `whsec_${key.slice(0, 20)}*${key.slice(21)}`, message: /expected base64 after "whsec_"/ },
  'a space inside': { secret: `whsec_${key.slice(0, 20)} ${key.slice(20)}`, message: /expected base64 after "whsec_"/ },
  'the URL alphabet': { secret: `whsec_${key.replace('+', '-')}`, message: /expected base64 after "whsec_"/ },
  'padding in the wrong place': { secret: `whsec_=${key}`, message: /expected base64 after "whsec_"/ },
  'too much padding': { secret: `whsec_${key}=`, message: /expected base64 after "whsec_"/ },
  'a cut': { secret: SECRET.slice(0, -3), message: /a cut or nothing: copy it again whole/ },
  'white space before it': { secret: ` ${SECRET}`, message: /begins or ends with white space or a quote: remove it/ },
  'white space behind it': { secret: `${SECRET} `, message: /begins or ends with white space or a quote: remove it/ },
  'a newline behind it': { secret: `${SECRET}\n`, message: /begins or ends with white space or a quote: remove it/ },
  'a carriage return behind text': { secret: `${TEXT}\r`, message: /begins or ends with white space or a quote: remove it/ },
  'double quotes': { secret: `"${SECRET}"`, message: /begins or ends with white space or a quote: remove it/ },
  'single quotes': { secret: `'${SECRET}'`, message: /begins or ends with white space or a quote: remove it/ },
  'a number': { secret: 42, message: /expected a signing secret or a non-empty array of them, got a value of type number/ },
  'an object': { secret: { secret: SECRET }, message: /got a value of type object/ },
  'a Buffer': { secret: Buffer.from(key, 'base64'), message: /got a value of type object/ },
  'an empty array': { secret: [], message: /a non-empty array of them, got an empty array/ },
  'an array of numbers': { secret: [42], message: /expected a signing secret \(a string\), got a value of type number/ },
  'an array with a hole': { secret: [SECRET, undefined], message: /expected a signing secret \(a string\), got undefined/ },
  'an array of arrays': { secret: [[SECRET]], message: /expected a signing secret \(a string\), got an array/ },
  null: { secret: null, message: /got null/ },
  'a cut that leaves bits over': { secret: SECRET.slice(0, -2), message: /a cut or nothing: copy it again whole/ },
  'an array with one that is wrong': { secret: [SECRET, `sk-${key}`], message: /got an API key/ }
}

t.test('a secret that cannot be right is refused at boot, and told why', async t => {
  environment(t, OTHER) // must not stand in
  async function refused (t: Test, boot: () => unknown, { secret, message }: { secret: unknown, message: RegExp }): Promise<void> {
    const error: Error & { code?: string } = await Promise.resolve().then(boot).then(() => t.fail('it was accepted') as never, error => error)
    t.equal(error.code, 'FST_OPENAI_WEBHOOK_INVALID_SECRET')
    t.match(error.message, message)
    for (const part of [key.slice(0, 8), key.slice(-8), TEXT]) {
      if (JSON.stringify(secret).includes(part)) t.notOk(error.message.includes(part), 'without the secret')
    }
  }

  for (const [name, bad] of Object.entries(BAD)) {
    const secret = bad.secret as string
    t.test(name, async t => {
      await refused(t, () => register(t, { secret }), bad)

      const app = await register(t, { secret: OTHER })
      await refused(t, () => app.openaiWebhook.route({ url: '/own', secret }), bad)
      await refused(t, () => app.post('/marked', { config: { openaiWebhook: { secret } } }, async () => {}), bad)

      const fetching = await register(t, { secret: () => secret })
      await refused(t, () => fetching.ready(), bad)
    })
  }
})

t.test('a function that has no secret at boot stops the boot', async t => {
  environment(t, SECRET) // must not stand in
  const reason = new Error('vault is sealed')
  const failing: Record<string, () => unknown> = {
    throws: () => { throw reason },
    rejects: async () => { throw reason }
  }
  for (const [name, secret] of Object.entries(failing)) {
    const app = await register(t, { secret: secret as () => string })
    await t.rejects(async () => { await app.ready() }, { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message: /`secret` function failed at boot: expected it to return the signing secret/, cause: reason }, name)
  }
  for (const [name, value] of Object.entries({ undefined, null: null, 'a promise of nothing': Promise.resolve(undefined) })) {
    const app = await register(t, { secret: (() => value) as unknown as () => string })
    await t.rejects(async () => { await app.ready() }, { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message: /expected a signing secret or a non-empty array of them, got (?:undefined|null)/ }, name)
  }
})

/** A secret function that the test answers. */
function vault (first: string | readonly string[] = SECRET) {
  const state = {
    calls: 0,
    answer: (): unknown => first,
    secret (): string {
      state.calls++
      return state.answer() as string
    }
  }
  return state
}

async function rotating (t: Test, options: OpenAIWebhookOptions = {}) {
  const source = vault()
  const app = await register(t, { secret: source.secret, ...options })
  const errors: unknown[] = []
  app.openaiWebhook.onError(error => { errors.push(error) })
  // The minute begins with the boot, so the clock stands still from there on.
  const clock = stoppedClock(t)
  await app.ready()
  t.equal(source.calls, 1, 'called once at boot')
  return { app, source, clock, errors }
}

function deferred<T> () {
  let resolve!: (value: T) => void
  const promise = new Promise<T>(_resolve => { resolve = _resolve })
  return { promise, resolve }
}

t.test('app.openaiWebhook shows it neither where it is printed, nor in a copy', async t => {
  const app = await build(t)
  await app.ready()
  for (const printed of [app.openaiWebhook, { ...app.openaiWebhook }]) {
    t.notMatch(inspect(printed, { depth: 10, getters: true }), SECRET)
    t.notMatch(JSON.stringify(printed), SECRET)
  }
})

t.test('a rotation heals itself', async t => {
  t.test('a new secret is accepted without a restart', async t => {
    const { app, source, clock, errors } = await rotating(t)
    source.answer = async () => [OTHER]

    t.same(await statuses(app, [signed(OTHER)]), [401])
    clock.advance(MINUTE - 1)
    t.same(await statuses(app, [signed(OTHER), signed()]), [401, 200])
    t.equal(source.calls, 1, 'not asked within a minute of boot')

    clock.advance(1)
    t.same(await statuses(app, [signed()]), [200])
    t.equal(source.calls, 1, 'nor while signatures match')

    errors.length = 0
    t.same(await statuses(app, [signed(OTHER)]), [200])
    t.equal(source.calls, 2)
    t.same(errors, [], 'and nothing has failed')
    t.same(await statuses(app, [signed(OTHER), signed()]), [200, 401], 'the old secret is gone with the function\'s answer')
    t.equal(source.calls, 2)
  })

  t.test('both secrets are accepted while the function returns both', async t => {
    const { app, source, clock } = await rotating(t)
    source.answer = () => [SECRET, OTHER]
    clock.advance(MINUTE)
    t.same(await statuses(app, [signed(OTHER)]), [200])
    t.same(await statuses(app, [signed(), signed(OTHER)]), [200, 200])
  })

  t.test('deliveries that fail at once share one call, and a flood makes no more', async t => {
    const { app, source, clock } = await rotating(t)
    const asked = deferred<void>()
    const answer = deferred<string>()
    source.answer = () => {
      asked.resolve()
      return answer.promise
    }
    clock.advance(MINUTE)
    const flood = statuses(app, Array.from({ length: 50 }, () => signed(OTHER)))
    await asked.promise
    t.same(await statuses(app, [signed()]), [200], 'what matches is not held up')
    answer.resolve(SECRET)
    t.same(new Set(await flood), new Set([401]))
    t.equal(source.calls, 2)

    t.same(new Set(await statuses(app, Array.from({ length: 50 }, () => signed(OTHER)))), new Set([401]))
    clock.advance(MINUTE - 1)
    t.same(await statuses(app, [signed(OTHER)]), [401])
    t.equal(source.calls, 2, 'at most once a minute')
    clock.advance(1)
    t.same(await statuses(app, [signed(OTHER)]), [401])
    t.equal(source.calls, 3)
  })

  t.test('what comes while it is asked waits for the same answer', async t => {
    const { app, source, clock } = await rotating(t)
    const answer = deferred<string>()
    source.answer = () => answer.promise
    clock.advance(MINUTE)
    const waiting = Array.from({ length: 3 }, () => app.openaiWebhook.unwrap(...unwrappable(signed(OTHER))))
    answer.resolve(OTHER)
    t.match(await Promise.all(waiting), waiting.map(() => ({ type: 'response.completed' })))
    t.equal(source.calls, 2)
  })

  t.test('only a signature that matches nothing asks', async t => {
    const { app, source, clock } = await rotating(t)
    clock.advance(MINUTE)
    const changed = (headers: Record<string, string>, { headers: good, body } = signed(OTHER)): Signed => ({ headers: { ...good, ...headers }, body })
    const refused = [
      changed({ 'webhook-id': '' }),
      changed({ 'webhook-id': 'a.b' }),
      changed({ 'webhook-timestamp': '1e9' }),
      sign(thin('response.completed'), { secret: OTHER, timestamp: Math.floor(Date.now() / 1000) - 301 }),
      sign('not JSON'),
      sign(thin('response.completed', {}))
    ]
    t.same(await statuses(app, refused), [401, 401, 401, 401, 400, 400])
    t.equal(source.calls, 1)
  })

  t.test('a clock set back does not silence it', async t => {
    const { app, source, clock } = await rotating(t)
    clock.advance(MINUTE)
    source.answer = () => SECRET
    t.same(await statuses(app, [signed(OTHER)]), [401])
    t.equal(source.calls, 2)
    const { now } = Date
    t.intercept(Date, 'now', { value: () => now() - 60 * MINUTE })
    clock.advance(MINUTE)
    source.answer = () => OTHER
    t.same(await statuses(app, [signed(OTHER)]), [200])
    t.equal(source.calls, 3)
  })

  const trouble: Record<string, { answer: () => unknown, told: object }> = {
    throws: { answer: () => { throw new Error('vault is sealed') }, told: { message: 'vault is sealed' } },
    rejects: { answer: async () => { throw new Error('vault is sealed') }, told: { message: 'vault is sealed' } },
    'returns nothing': { answer: () => undefined, told: { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message: /got undefined/ } },
    'returns an API key': { answer: async () => `sk-${key}`, told: { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message: /API key/ } },
    'returns one secret that is wrong': { answer: () => [OTHER, ''], told: { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message: /empty string/ } }
  }
  for (const [name, { answer, told }] of Object.entries(trouble)) {
    t.test(`the old keys stay when the function ${name}`, async t => {
      const { app, source, clock, errors } = await rotating(t)
      source.answer = answer
      clock.advance(MINUTE)
      t.same(await statuses(app, [signed(OTHER)]), [401])
      t.equal(source.calls, 2)
      t.match(errors, [told, { code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE' }], 'onError is told of both')
      t.same(await statuses(app, [signed(), signed(OTHER)]), [200, 401])
      t.equal(source.calls, 2, 'a failure does not make it ask sooner')

      source.answer = () => OTHER
      clock.advance(MINUTE)
      t.same(await statuses(app, [signed(OTHER)]), [200], 'and it heals')
    })
  }

  t.test('a function that hangs holds a delivery up no longer than the deadline', async t => {
    const { app, source, clock, errors } = await rotating(t, { deadline: 2_000 })
    let asked = deferred<void>()
    source.answer = () => {
      asked.resolve()
      return new Promise(() => {})
    }
    clock.advance(MINUTE)
    let answered = false
    const held = statuses(app, [signed(OTHER)]).finally(() => { answered = true })
    await asked.promise
    clock.advance(1_999)
    t.same(await statuses(app, [signed()]), [200], 'what matches is not held up')
    t.equal(answered, false)
    clock.advance(1)
    t.same(await held, [401])
    t.match(errors, [{ message: /`secret` function took more than 2000 ms/ }, { code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE' }])
    t.same(await statuses(app, [signed()]), [200], 'the old keys stay')

    asked = deferred<void>()
    source.answer = () => {
      asked.resolve()
      return OTHER
    }
    clock.advance(MINUTE)
    t.same(await statuses(app, [signed(OTHER)]), [200], 'and it is asked again')
    await asked.promise
  })
})

t.test('without a route of its own the plugin needs no secret until one is asked for', async t => {
  environment(t, undefined)
  const app = await register(t, { path: false })
  const missing = { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message: /got neither/ }
  t.throws(() => app.openaiWebhook.route({ url: '/hook' }), missing)
  t.throws(() => app.post('/marked', { config: { openaiWebhook: {} } }, async () => {}), missing)
  app.openaiWebhook.route({ url: '/own', secret: SECRET })
  await app.ready()
  t.same(await statuses(app, [signed(), signed(OTHER)], '/own'), [200, 401])
  await t.rejects(app.openaiWebhook.unwrap(...unwrappable(signed())), missing)
  t.match(await app.openaiWebhook.unwrap(...unwrappable(signed()), { secret: SECRET }), { type: 'response.completed' })
})

t.test('without a route of its own the plugin\'s secret is that of its routes', async t => {
  const app = await register(t, { path: false, secret: async () => SECRET })
  app.openaiWebhook.route({ url: '/hook' })
  app.post('/marked', { config: { openaiWebhook: {} } }, async () => {})
  await app.ready()
  t.same(await statuses(app, [signed(), signed(OTHER)], '/hook'), [200, 401])
  t.same(await statuses(app, [signed(), signed(OTHER)], '/marked'), [200, 401])
  t.match(await app.openaiWebhook.unwrap(...unwrappable(signed())), { type: 'response.completed' })
})

t.test('unwrap() asks the secret function no more often than a route does', async t => {
  for (const options of [{ path: false }, {}] as const) {
    const source = vault()
    const app = await register(t, { ...options, secret: source.secret })
    await app.ready()
    for (const verifier of [undefined, standardWebhooks(), standardWebhooks()]) {
      const overrides = verifier === undefined ? {} : { verifier }
      for (let i = 0; i < 3; i++) {
        t.match(await app.openaiWebhook.unwrap(...unwrappable(signed()), overrides), { type: 'response.completed' })
        await t.rejects(app.openaiWebhook.unwrap(...unwrappable(signed(OTHER)), overrides), { code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE' })
      }
    }
    t.equal(source.calls, 1)
  }
})

t.test('a secret function given to unwrap() is no part of the boot', async t => {
  const app = await register(t, { secret: SECRET })
  const source = vault(OTHER)
  t.match(await app.openaiWebhook.unwrap(...unwrappable(signed(OTHER)), { secret: source.secret }), { type: 'response.completed' })
  await app.ready()
  t.equal(source.calls, 1)
})

t.test('routes share one call of the plugin\'s secret function at boot', async t => {
  const source = vault()
  const app = await register(t, { path: false, secret: source.secret })
  app.openaiWebhook.route({ url: '/one' }).route({ url: '/two', tolerance: 60 })
  await app.ready()
  t.equal(source.calls, 1)
})

t.test('a route with a secret of its own refuses the plugin\'s', async t => {
  const source = vault(OTHER)
  const app = await register(t, { secret: SECRET })
  app.openaiWebhook.route({ url: '/string', secret: OTHER })
  app.openaiWebhook.route({ url: '/function', secret: source.secret })
  app.post('/marked', { config: { openaiWebhook: { secret: [OTHER] } } }, async () => {})
  await app.ready()
  t.equal(source.calls, 1, 'a route\'s function is called at boot too')
  for (const url of ['/string', '/function', '/marked']) t.same(await statuses(app, [signed(OTHER), signed()], url), [200, 401], url)
  t.same(await statuses(app, [signed(), signed(OTHER)]), [200, 401], 'and the plugin\'s own route refuses theirs')

  const clock = stoppedClock(t)
  clock.advance(MINUTE)
  source.answer = () => SECRET
  t.same(await statuses(app, [signed()], '/string'), [401])
  t.equal(source.calls, 1)
  t.same(await statuses(app, [signed()], '/function'), [200], 'and it heals on its own')
})

t.test('a route with the plugin\'s secret shares its keys', async t => {
  const source = vault()
  const app = await register(t, { secret: source.secret })
  app.openaiWebhook.route({ url: '/wide', tolerance: 3_600 })
  await app.ready()
  t.equal(source.calls, 1)
  const clock = stoppedClock(t)
  clock.advance(MINUTE)
  source.answer = () => OTHER
  t.same(await statuses(app, [signed(OTHER)], '/wide'), [200])
  t.same(await statuses(app, [signed(OTHER)]), [200], 'one call heals both')
  t.equal(source.calls, 2)
})

t.test('a secret function is one, however many ask it', async t => {
  const wrong = { code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE' }

  t.test('twenty routes and the plugin itself, at boot and in a rotation', async t => {
    const source = vault()
    const app = await register(t, { secret: source.secret })
    const urls = [URL, ...Array.from({ length: 20 }, (_, i) => `/${i}`)]
    for (const url of urls.slice(1, 11)) app.openaiWebhook.route({ url, secret: source.secret, tolerance: 60 })
    for (const url of urls.slice(11)) app.post(url, { config: { openaiWebhook: { secret: source.secret } } }, async () => {})
    await app.ready()
    t.equal(source.calls, 1)

    const clock = stoppedClock(t)
    clock.advance(MINUTE)
    source.answer = async () => OTHER
    const answers = await Promise.all(urls.map(async url => await statuses(app, [signed(OTHER)], url)))
    t.same(answers.flat(), urls.map(() => 200))
    t.equal(source.calls, 2, 'one call heals all')
    t.same(await statuses(app, [signed()], '/7'), [401], 'the old secret is gone everywhere')
  })

  t.test('endpoints that make keys in different ways', async t => {
    const source = vault()
    const app = await register(t, { secret: source.secret })
    app.openaiWebhook.route({ url: '/guide', secret: source.secret, verifier: xOpenAISignature() })
    app.openaiWebhook.route({ url: '/own-guide', verifier: xOpenAISignature() })
    await app.ready()
    t.equal(source.calls, 1)
    const clock = stoppedClock(t)
    clock.advance(MINUTE)
    source.answer = () => OTHER
    t.same(await statuses(app, [signedByGuide(OTHER)], '/guide'), [200])
    t.same(await statuses(app, [signed(OTHER)]), [200])
    t.same(await statuses(app, [signedByGuide(OTHER)], '/own-guide'), [200])
    t.equal(source.calls, 2)
  })

  t.test('what one of them cannot use leaves its keys as they were, and is told', async t => {
    const { app, source, clock, errors } = await rotating(t)
    source.answer = () => 'whsec_not base64'
    clock.advance(MINUTE)
    t.same(await statuses(app, [signed(OTHER), signed()]), [401, 200])
    t.match(await app.openaiWebhook.unwrap(...unwrappable(signedByGuide('whsec_not base64')), { verifier: xOpenAISignature() }), { type: 'response.completed' })
    t.equal(source.calls, 2)
    t.match(errors, [{ code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET' }, wrong], 'once')
  })

  t.test('unwrap(), with the function of its own', async t => {
    const app = await register(t, { secret: SECRET })
    await app.ready()
    const source = vault(OTHER)
    const clock = stoppedClock(t)
    const unwrap = async (delivery: Signed, verifier = standardWebhooks()) => await app.openaiWebhook.unwrap(...unwrappable(delivery), { secret: source.secret, verifier })
    const right = { type: 'response.completed' }
    t.match(await Promise.all([1, 2, 3].map(async () => await unwrap(signed(OTHER)))), [right, right, right])
    t.equal(source.calls, 1, 'who comes at once shares the first call')
    for (let i = 0; i < 5; i++) {
      t.match(await unwrap(signed(OTHER)), right)
      t.match(await unwrap(signedByGuide(OTHER), xOpenAISignature()), right)
      await t.rejects(unwrap(signed()), wrong)
    }
    clock.advance(MINUTE - 1)
    await t.rejects(unwrap(signed()), wrong)
    t.equal(source.calls, 1, 'at most once a minute')

    source.answer = () => SECRET
    clock.advance(1)
    t.match(await unwrap(signed()), right)
    t.equal(source.calls, 2)
  })

  t.test('a function that fails when unwrap() first asks it is not asked for a minute either', async t => {
    const app = await register(t, { secret: SECRET })
    await app.ready()
    const source = vault(OTHER)
    source.answer = () => { throw new Error('vault is sealed') }
    const clock = stoppedClock(t)
    const unwrap = async () => await app.openaiWebhook.unwrap(...unwrappable(signed(OTHER)), { secret: source.secret })
    for (let i = 0; i < 3; i++) await t.rejects(unwrap(), { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET' })
    t.equal(source.calls, 1)
    source.answer = () => OTHER
    clock.advance(MINUTE)
    t.match(await unwrap(), { type: 'response.completed' })
  })

  t.test('unwrap() before the boot has called for it', async t => {
    const source = vault()
    const app = await register(t, { secret: source.secret })
    const answer = deferred<string>()
    source.answer = () => answer.promise
    const unwrapped = app.openaiWebhook.unwrap(...unwrappable(signed()))
    const ready = app.ready()
    answer.resolve(SECRET)
    t.match(await unwrapped, { type: 'response.completed' })
    await ready
    t.equal(source.calls, 1)
    t.same(await statuses(app, [signed()]), [200])
  })

  t.test('unwrap() while the boot is calling it', async t => {
    for (const fails of [false, true]) {
      const source = vault()
      const app = await register(t, { secret: source.secret })
      const [asked, answer] = [deferred<void>(), deferred<string>()]
      source.answer = async () => {
        asked.resolve()
        const secret = await answer.promise
        if (fails) throw new Error('vault is sealed')
        return secret
      }
      const ready = Promise.resolve(app.ready()).catch(error => error)
      await asked.promise
      const unwrapped = app.openaiWebhook.unwrap(...unwrappable(signed())).catch(error => error)
      answer.resolve(SECRET)
      t.match(await unwrapped, fails ? { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET' } : { type: 'response.completed' })
      await ready
      t.equal(source.calls, 1)
    }
  })

  t.test('two functions are two', async t => {
    const [one, two] = [vault(), vault(OTHER)]
    const app = await register(t, { secret: one.secret })
    app.openaiWebhook.route({ url: '/two', secret: two.secret })
    await app.ready()
    t.same([one.calls, two.calls], [1, 1])
    t.same([await statuses(app, [signed(), signed(OTHER)]), await statuses(app, [signed(), signed(OTHER)], '/two')], [[200, 401], [401, 200]])
  })
})
