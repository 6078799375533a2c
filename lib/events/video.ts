// No type of the SDK spells these two out yet; `WebhookCreateParams.event_types` lists them.
import { family, Thin } from './schema.ts'

export const video = family({
  'video.completed': {
    description: 'Sent when a video generation has completed. data.id is the video id.',
    data: Thin,
    sample: { id: 'video_685c059ae39c8190' }
  },
  'video.failed': {
    description: 'Sent when a video generation has failed. data.id is the video id.',
    data: Thin,
    sample: { id: 'video_685c059ae39c8190' }
  }
})
