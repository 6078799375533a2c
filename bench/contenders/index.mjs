/**
 * @typedef {object} Contender
 * @property {string} label
 * @property {string} module in this directory; its `build(options)` returns a Fastify app or a server of node:http
 * @property {object} [options]
 * @property {string} [scheme] how its deliveries are signed
 * @property {boolean} [checksNothing] a forged delivery is answered 200 too
 * @property {boolean} [refusesAll] a correct delivery is answered 4xx too
 * @property {string} [needs] the resource that it needs; see Bench.missing
 */

const ours = (label, options, rest) => ({ label: `fastify-openai-webhook${label}`, module: 'ours', options, ...rest })

/** @type {Record<string, Contender>} */
export const contenders = {
  bare: { label: 'bare Fastify route, nothing checked', module: 'bare', checksNothing: true },
  hmac: { label: 'Fastify + inline node:crypto HMAC', module: 'hmac' },
  'ours-sync': ours('', { handler: 'sync' }),
  ours: ours(', async handler', { handler: 'async' }),
  'ours-metrics': ours(' + metrics', { handler: 'sync', metrics: true }),
  'ours-redis': ours(' + Redis', { handler: 'sync', store: 'redis' }, { needs: 'redis' }),
  octokit: { label: '@octokit/webhooks middleware', module: 'octokit', scheme: 'github' },
  standardwebhooks: { label: 'Fastify + standardwebhooks', module: 'standardwebhooks' },
  svix: { label: 'Fastify + svix', module: 'svix' },
  'raw-body-openai': { label: 'fastify-raw-body + openai', module: 'raw-body-openai' },
  'hono-openai': { label: 'Hono + openai', module: 'hono-openai' },
  'express-openai': { label: 'Express + openai', module: 'express-openai' }
}
