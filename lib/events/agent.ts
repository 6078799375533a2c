import { Type } from '../typebox.ts'
import { known, markedFamily, Thin } from './schema.ts'

const session = {
  id: Type.String(),
  environment_type: known('none', 'openai_hosted', 'self_hosted'),
  environment_id: Type.Optional(Type.String())
}

const environment = { id: 'env_685c059a96f48190a05d7b3ce1824f69' }
const sample = {
  id: 'sess_685c059aa4d08190b7c38e15f0296da4',
  environment_type: 'openai_hosted',
  environment_id: environment.id
}

export const agent = markedFamily({
  'agent.environment.expired': {
    description: 'Sent when an agent environment expires. data.id is the environment id.',
    data: Thin,
    sample: environment
  },
  'agent.environment.failed': {
    description: 'Sent when setup of a prewarmed environment fails. data.id is the environment id.',
    data: Thin,
    sample: environment
  },
  'agent.environment.ready': {
    description: 'Sent when a prewarmed environment is ready. data.id is the environment id.',
    data: Thin,
    sample: environment
  },
  'agent.environment.suspended': {
    description: 'Sent when an agent environment is suspended. data.id is the environment id.',
    data: Thin,
    sample: environment
  },
  'agent.session.action_required': {
    description: 'Sent when an agent session requires an action.',
    data: Type.Object({
      id: Type.String(),
      required_action: Type.Object({
        type: known('computer_use_approval_request', 'mcp_approval_request', 'function_call', 'environment_connection')
      })
    }),
    sample: { id: sample.id, required_action: { type: 'function_call' } }
  },
  'agent.session.created': {
    description: 'Sent when an agent session is created.',
    data: Type.Object({
      ...session,
      connect: Type.Optional(Type.Object({ remote_url: Type.String() }))
    }),
    sample: { ...sample, environment_type: 'self_hosted', connect: { remote_url: 'wss://api.openai.com/v1/agents/connect' } }
  },
  'agent.session.failed': {
    description: 'Sent when an agent session fails.',
    data: Type.Object(session),
    sample,
    once: true
  },
  'agent.session.idle': {
    description: 'Sent when an agent session becomes idle.',
    data: Type.Object(session),
    sample
  },
  'agent.session.in_progress': {
    description: 'Sent when an agent session starts processing a turn.',
    data: Type.Object(session),
    sample
  }
})
