"""The agent: one facade where every request is authorised; ledger, executor, drift watch."""
