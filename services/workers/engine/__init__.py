"""The inference engine: sessions, KV slots, continuous batching, sampling, text. No NATS and no asyncio inside."""
