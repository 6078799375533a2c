// What is behind an event, with a client of the official `openai` package, which is the caller's.
export { retrieve } from './retrieve.ts'
export type { Retrievable, RetrieveOptions } from './retrieve.ts'
export { batchResults } from './batch-results.ts'
export type { BatchClient, BatchLike, BatchEvent, BatchResultsOptions } from './batch-results.ts'
export type { BatchEndpoint, BatchFailure, BatchFault, BatchResult, BatchSuccess } from './batch-line.ts'
export type { ResourceClient, ResourceKind, ResourceOf, UntypedResource } from './kinds.ts'
export { reconcile } from './reconcile.ts'
export type { ReconciledEvent, ReconcileOptions, ReconcileProgress, ReconcileReport } from './reconcile.ts'
