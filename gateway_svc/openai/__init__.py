"""The HTTP door: the OpenAI routes and what operators ask for."""
