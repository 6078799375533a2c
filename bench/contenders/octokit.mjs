// The webhooks of another provider, with its own signature, and payloads of the same size.
import { createServer } from 'node:http'
import { createNodeMiddleware, Webhooks } from '@octokit/webhooks'
import { SECRET, PATH } from '../deliveries.mjs'

const SILENT = { debug () {}, info () {}, warn () {}, error () {} }

export async function build () {
  const webhooks = new Webhooks({ secret: SECRET })
  webhooks.on('push', () => {})
  return createServer(createNodeMiddleware(webhooks, { path: PATH, log: SILENT }))
}
