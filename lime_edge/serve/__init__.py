"""The server: the OpenAI HTTP API over one bundle, a skill per request. Needs the extra [serve]."""
