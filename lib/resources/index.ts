// Fetches the resources that events are about, with the caller's client of the official `openai` package.
export { retrieve } from './retrieve.ts'
export type { Retrievable, RetrieveOptions } from './retrieve.ts'
export { batchResults } from './batch-results.ts'
export type { BatchClient, BatchLike, BatchEvent, BatchResultsOptions } from './batch-results.ts'
export type { BatchEndpoint, BatchFailure, BatchFault, BatchResult, BatchSuccess } from './batch-line.ts'
export type { ResourceClient, ResourceKind, ResourceOf, UntypedResource } from './kinds.ts'
export { reconcile } from './reconcile.ts'
export type { ReconciledEvent, ReconcileOptions, ReconcileProgress, ReconcileReport } from './reconcile.ts'
