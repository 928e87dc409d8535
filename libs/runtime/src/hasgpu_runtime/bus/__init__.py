"""The bus ports, on NATS and in memory."""
