// Checked by tsc, never run: what retrieve() and batchResults() give and refuse, with the official client's own types.
import type { OpenAI } from 'openai'
import type { ChatCompletion } from 'openai/resources/chat/completions'
import type { CreateEmbeddingResponse } from 'openai/resources/embeddings'
import type { Response } from 'openai/resources/responses/responses'
import { batchResults, retrieve } from '../../lib/resources/index.ts'
import type { ResourceOf, UntypedResource } from '../../lib/resources/index.ts'
import type { OfficialEvents, UnknownEvent, WebhookEvent } from '../../lib/index.ts'

type Equal<A, B> = (<T>() => T extends A ? 1 : 2) extends (<T>() => T extends B ? 1 : 2) ? true : false
declare function same<A, B> (..._proof: Equal<A, B> extends true ? [] : [never, A, B]): void

declare const client: OpenAI
declare const events: OfficialEvents

// Each event gives the SDK's own type of its resource.
same<ResourceOf<OpenAI, 'response.completed'>['output_text'], string>()
same<ResourceOf<OpenAI, 'batch.failed'>['output_file_id'], OpenAI.Batch['output_file_id']>()
same<ResourceOf<OpenAI, 'fine_tuning.job.succeeded'>['fine_tuned_model'], string | null>()
same<ResourceOf<OpenAI, 'eval.run.canceled'>['eval_id'], string>()
same<ResourceOf<OpenAI, 'agent.session.idle'>['last_active_at'], number>()
same<ResourceOf<OpenAI, 'agent.environment.ready'>['object'], 'agent.environment'>()
same<ResourceOf<OpenAI, 'safety.org_alert.created'>['object'], 'safety.alert'>()
same<ResourceOf<OpenAI, 'safety.warning_issued'>['notice']['type'], 'warning' | 'deactivation'>()
same<ResourceOf<OpenAI, 'video.failed'>['object'], 'video'>()
// None is `never` by a change of the SDK's.
type Lost = { [Type in keyof OfficialEvents]: [ResourceOf<OpenAI, Type>] extends [never] ? Type : never }[keyof OfficialEvents]
same<Lost, 'realtime.call.incoming' | 'live.call.incoming' | 'live.transport.incoming' | 'live.transport.connected' | 'safety_identifier.blocked'>()

export async function typed (): Promise<void> {
  const batch = await retrieve(client, events['batch.completed'], { signal: new AbortController().signal })
  same<typeof batch.output_file_id, string | undefined>()
  const response = await retrieve(client, events['response.completed'])
  same<typeof response.output_text, string>()
  const run = await retrieve(client, events['eval.run.failed'], { evalId: 'eval_1' })
  same<typeof run.object, 'eval.run'>()
  // A family
  const any = await retrieve(client, events['response.completed'] as OfficialEvents['response.completed'] | OfficialEvents['batch.failed'])
  same<typeof any.object, 'response' | 'batch'>()

  // A client of another kind: as much as is known without types.
  const plain = await retrieve({ get: async (_path: string) => ({}) }, events['agent.session.idle'])
  same<typeof plain, UntypedResource<'agent.session'>>()
  console.log(batch, response, run, any, plain)
}

export async function refused (): Promise<void> {
  // @ts-expect-error the API asks for the eval's id
  await retrieve(client, events['eval.run.succeeded'])
  // @ts-expect-error a call is not retrieved: accept it by client.realtime.calls.accept(event.data.call_id, …)
  await retrieve(client, events['realtime.call.incoming'])
  // @ts-expect-error nothing is behind it
  await retrieve(client, events['safety_identifier.blocked'])
  // @ts-expect-error one of the two has no resource
  await retrieve(client, events['batch.failed'] as OfficialEvents['batch.failed'] | OfficialEvents['live.transport.connected'])
  // @ts-expect-error narrow the event by its type first
  await retrieve(client, {} as WebhookEvent)
  // @ts-expect-error narrow the event by its type first
  await retrieve(client, {} as UnknownEvent)
  // @ts-expect-error no event of a batch
  batchResults(client, events['response.completed'])
}

export async function results (batch: OpenAI.Batch): Promise<void> {
  for await (const result of batchResults(client, events['batch.completed'])) {
    same<typeof result.customId, string>()
    if (result.error !== null) {
      same<typeof result.error.code, string | null>()
      same<typeof result.body, unknown>()
    } else if (result.endpoint === '/v1/responses') {
      const body: Response = result.body
      console.log(body.output_text)
    } else if (result.endpoint === '/v1/chat/completions') {
      const body: ChatCompletion = result.body
      console.log(body.choices[0]?.message.content)
    } else if (result.endpoint === '/v1/embeddings') {
      const body: CreateEmbeddingResponse = result.body
      console.log(body.data[0]?.embedding)
    } else {
      same<typeof result.body, Record<string, unknown>>()
    }
  }
  for await (const { body } of batchResults(client, batch)) console.log(body)
}
