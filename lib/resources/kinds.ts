// All types here are structural: any version of the `openai` package contributes its own types, and none has to be installed.

/** The resources that events are about, named as in the API's `object` field. */
export type ResourceKind =
  'agent.environment' | 'agent.session' | 'batch' | 'eval.run' | 'fine_tuning.job' | 'response' | 'safety.alert' | 'safety.case' | 'video'

/** The resource that `data.id` of an event names, by event type or by family. */
const KINDS = {
  'agent.environment.*': 'agent.environment',
  'agent.session.*': 'agent.session',
  'batch.*': 'batch',
  'eval.run.*': 'eval.run',
  'fine_tuning.job.*': 'fine_tuning.job',
  'response.*': 'response',
  'safety.alert.created': 'safety.alert',
  'safety.org_alert.created': 'safety.alert',
  'safety.warning_issued': 'safety.case',
  'safety.deactivation_issued': 'safety.case',
  'video.*': 'video'
} as const satisfies Record<string, ResourceKind>

/** Header of the API's requests for agents, which are in beta. */
export const AGENTS = { 'OpenAI-Beta': 'agents=v1' }

/** What to do about an event that has no resource. */
const INSTEAD = {
  'realtime.call.incoming': 'a call is not retrieved: accept it by client.realtime.calls.accept(event.data.call_id, …)',
  'live.call.incoming': 'a session that waits is not retrieved: accept it by client.live.sessions.accept(event.data.session_id, …)',
  'live.transport.incoming': 'a session that waits is not retrieved: accept it by client.live.sessions.accept(event.data.session_id, …)',
  'live.transport.connected': 'a session is not retrieved: observe it by a SidebandWS of openai/resources/live/sideband/ws with event.data.session_id',
  'safety_identifier.blocked': 'nothing is behind it: event.data has all there is'
} as const satisfies Record<string, string>

const UNKNOWN = 'its type is of no resource that is known here: call the SDK yourself'

type Kinds = typeof KINDS

/** The kind of resource of an event type; `never` when it has none. */
export type KindOf<Type extends string> = {
  [Name in keyof Kinds]: Name extends `${infer Family}.*`
    ? Type extends `${Family}.${string}` ? Kinds[Name] : never
    : Type extends Name ? Kinds[Name] : never
}[keyof Kinds]

/** Why an event has no resource, as a text; `never` when it has one. */
export type Problem<Type extends string> = string extends Type
  ? 'narrow the event by its type first'
  : Type extends string ? [KindOf<Type>] extends [never] ? Type extends keyof typeof INSTEAD ? typeof INSTEAD[Type] : typeof UNKNOWN : never : never

export function kindOf (type: string): ResourceKind | undefined {
  return Object.hasOwn(KINDS, type) ? KINDS[type as keyof Kinds] : KINDS[`${type.slice(0, type.lastIndexOf('.'))}.*` as keyof Kinds]
}

export function insteadOf (type: string): string {
  return Object.hasOwn(INSTEAD, type) ? INSTEAD[type as keyof typeof INSTEAD] : UNKNOWN
}

/** What a method of the SDK resolves to, if that is of the given kind. */
export type Answer<Method, Kind extends string> = Method extends (...args: never[]) => infer Answered ? Extract<Awaited<Answered>, { object: Kind }> : never

/** A resource for which the SDK has no type. */
export interface UntypedResource<Kind extends string = string> {
  id: string
  object: Kind
  [field: string]: unknown
}

interface Methods<Client> {
  'agent.environment': Client extends { beta: { agents: { environments: { retrieve: infer Method } } } } ? Method : undefined
  'agent.session': Client extends { beta: { agents: { sessions: { retrieve: infer Method } } } } ? Method : undefined
  batch: Client extends { batches: { retrieve: infer Method } } ? Method : undefined
  'eval.run': Client extends { evals: { runs: { retrieve: infer Method } } } ? Method : undefined
  'fine_tuning.job': Client extends { fineTuning: { jobs: { retrieve: infer Method } } } ? Method : undefined
  response: Client extends { responses: { retrieve: infer Method } } ? Method : undefined
  'safety.alert': Client extends { safety: { alerts: { retrieve: infer Method } } } ? Method : undefined
  'safety.case': Client extends { safety: { cases: { retrieve: infer Method } } } ? Method : undefined
  video: Client extends { videos: { retrieve: infer Method } } ? Method : undefined
}

/** The resource of a kind, with the client's own type for it. */
export type Resource<Client, Kind extends ResourceKind> = Kind extends ResourceKind
  ? Methods<Client>[Kind] extends undefined ? UntypedResource<Kind> : Answer<Methods<Client>[Kind], Kind>
  : never

/** The resource of an event type, with the client's own type for it. */
export type ResourceOf<Client, Type extends string> = Resource<Client, KindOf<Type>>

/** The part of the official client (`openai` 6 or 7) that every function here uses. */
export interface ResourceClient {
  get (path: string, options?: any): PromiseLike<unknown>
}
