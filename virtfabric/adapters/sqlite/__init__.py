"""Durable records in SQLite files: the journal and the audit log."""
