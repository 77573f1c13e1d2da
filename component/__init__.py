"""Library of LongQLoRA. Imports run one way only: see docs/architecture.md."""
