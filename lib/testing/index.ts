// No test framework is imposed: everything here is a plain function.

// Events and deliveries
export { sampleEvent, sampleTypes } from './sample.ts'
export type { SampleType } from './sample.ts'
export { newWebhookId, sign, testSecret } from './sign.ts'
export type { SignedHeaders, SignOptions } from './sign.ts'
export { deliver, faultNames, forge, redeliver } from './deliver.ts'
export type { DeliverOptions, Fault } from './deliver.ts'

// For those who write a store, a runner or an inbox of their own
export { inboxContract, runnerContract, storeContract } from './contracts.ts'
export type { ContractCase, InboxUnderTest } from './contracts.ts'
