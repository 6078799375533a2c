// Everything here is a plain function, so that it works with any test framework.

// Events and deliveries
export { sampleEvent, sampleTypes } from './sample.ts'
export type { SampleType } from './sample.ts'
export { newWebhookId, sign, testSecret } from './sign.ts'
export type { SignedHeaders, SignOptions } from './sign.ts'
export { deliver, faultNames, forge, redeliver } from './deliver.ts'
export type { DeliverOptions, Fault } from './deliver.ts'

// For implementers of a store, a runner or an inbox
export { inboxContract, runnerContract, storeContract } from './contracts.ts'
export type { ContractCase, InboxUnderTest } from './contracts.ts'
