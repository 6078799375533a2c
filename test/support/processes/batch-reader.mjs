// Reads the results of a batch from the API at argv[2], and reports the time and memory that it took.
import OpenAI from 'openai'
import { batchResults } from '../../../dist/resources/index.js'

const client = new OpenAI({ apiKey: 'sk-test', baseURL: process.argv[2], maxRetries: 0 })
let lines = 0
let bytes = 0
// maxRSS is not used, because a process inherits the value of its parent.
let rss = 0
for await (const { customId, id, body, error } of batchResults(client, { endpoint: '/v1/responses', output_file_id: 'file-1' })) {
  if (lines++ % 1_000 === 0) rss = Math.max(rss, process.memoryUsage.rss())
  bytes += JSON.stringify({ id, custom_id: customId, response: { status_code: 200, request_id: 'req_1', body }, error }).length + 1
}
console.log(JSON.stringify({ lines, bytes, rss }))
