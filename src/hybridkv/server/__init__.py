"""An OpenAI-compatible server: HTTP in, requests to a scheduler, replies out. Needs `hybridkv[serve]`."""
