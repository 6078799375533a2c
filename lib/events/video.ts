// The SDK has no types for these two events yet, but lists them in `WebhookCreateParams.event_types`.
import { family, Thin } from './schema.ts'

const sample = { id: 'video_685c059ae5748190bd12a86f40c7e935048d1b6ea9f2c073' }

export const video = family({
  'video.completed': {
    description: 'Sent when a video generation has completed. data.id is the video id.',
    data: Thin,
    sample,
    once: true
  },
  'video.failed': {
    description: 'Sent when a video generation has failed. data.id is the video id.',
    data: Thin,
    sample,
    once: true
  }
})
