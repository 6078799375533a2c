import { Type } from '../typebox.ts'
import { family, known } from './schema.ts'

const sip = {
  sip_headers: Type.Array(Type.Object({ name: Type.String(), value: Type.String() })),
  sip_media_security: Type.Optional(known('rtp', 'srtp'))
}

const sample = {
  sip_headers: [
    { name: 'From', value: 'sip:+14155550100@sip.example.com' },
    { name: 'To', value: 'sip:proj_abc123@sip.api.openai.com' },
    { name: 'Call-ID', value: '03782086-4ce9-44bf-8b0d-4e303d2cc590' }
  ],
  sip_media_security: 'srtp'
}

/** Incoming calls carry no `data.id`: the call or session id is what accepts them. */
export const call = family({
  'realtime.call.incoming': {
    description: 'Sent when an incoming SIP call is available for Realtime acceptance. No data.id.',
    data: Type.Object({ call_id: Type.String(), ...sip }),
    sample: { call_id: 'rtc_685c059ae39c8190', ...sample }
  },
  'live.call.incoming': {
    description: 'Sent when an incoming SIP session is available for Live acceptance (kept for old subscriptions). No data.id.',
    data: Type.Object({ session_id: Type.String(), ...sip }),
    sample: { session_id: 'live_685c059ae39c8190', ...sample }
  },
  'live.transport.incoming': {
    description: 'Sent when an incoming SIP session is available for Live acceptance. No data.id.',
    data: Type.Object({ session_id: Type.String(), type: Type.Literal('sip'), ...sip }),
    sample: { session_id: 'live_685c059ae39c8190', type: 'sip', ...sample }
  }
})
