import { Type } from '../typebox.ts'
import { guideFamily } from './schema.ts'

const id = Type.String()
const text = Type.Optional(Type.String())
const count = Type.Optional(Type.Integer())
const counts = Type.Optional(Type.Object({ total: Type.Integer(), completed: Type.Integer(), failed: Type.Integer() }))
const failure = Type.Optional(Type.Object({ message: Type.String(), code: Type.String() }))

/**
 * Events that a community guide describes and OpenAI does not send today, and the shapes of `batch.completed` and `batch.failed` in that guide,
 * which have more fields.
 */
export const guideEntries = guideFamily({
  'batch.created': {
    description: 'The guide: a batch was created.',
    data: Type.Object({ id, object: text, endpoint: text, status: text }),
    sample: { id: 'batch_685c059ac7b08190a3e41f0d92b6c875', object: 'batch', endpoint: '/v1/chat/completions', status: 'validating' }
  },
  'batch.in_progress': {
    description: 'The guide: a batch has started.',
    data: Type.Object({ id, status: text, request_counts: counts }),
    sample: { id: 'batch_685c059ac7b08190a3e41f0d92b6c875', status: 'in_progress', request_counts: { total: 100, completed: 45, failed: 2 } }
  },
  'batch.completed': {
    description: 'Sent when a batch API request has been completed, with the fields that the guide shows.',
    data: Type.Object({ id, status: text, output_file_id: text, request_counts: counts }),
    sample: {
      id: 'batch_685c059ac7b08190a3e41f0d92b6c875',
      status: 'completed',
      output_file_id: 'file-Lm4Tq8ZxVc2RnK7yHbWpDs',
      request_counts: { total: 100, completed: 98, failed: 2 }
    }
  },
  'batch.failed': {
    description: 'Sent when a batch API request has failed, with the fields that the guide shows.',
    data: Type.Object({ id, status: text, errors: failure }),
    sample: { id: 'batch_685c059ac7b08190a3e41f0d92b6c875', status: 'failed', errors: { message: 'Batch processing failed', code: 'batch_error' } }
  },
  'fine_tune.completed': {
    description: 'The guide: a fine-tune has completed.',
    data: Type.Object({ id, model: text, status: text, trained_tokens: count }),
    sample: { id: 'ft-Kd8vN3pXqZ6mTb9wRyL2cHjF', model: 'ft:gpt-4o-2024-08-06:acme::B7xKq2Lm', status: 'succeeded', trained_tokens: 50000 }
  },
  'fine_tune.failed': {
    description: 'The guide: a fine-tune has failed.',
    data: Type.Object({ id, status: text, error: failure }),
    sample: { id: 'ft-Kd8vN3pXqZ6mTb9wRyL2cHjF', status: 'failed', error: { message: 'Training data invalid', code: 'invalid_training_data' } }
  },
  'file.processed': {
    description: 'The guide: a file has been processed.',
    data: Type.Object({ id, purpose: text, status: text, bytes: count }),
    sample: { id: 'file-Gp6YtN9sJk3XwQ5vBzRcTd', purpose: 'fine-tune', status: 'processed', bytes: 1048576 }
  }
})
