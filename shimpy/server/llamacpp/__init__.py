"""llama.cpp's dialect: the routes of its server that are not OpenAI's.

Its server holds one model, so its clients name none; see `choosing`.
"""
