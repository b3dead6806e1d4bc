"""The long run: random verbs for an hour with kills and bad subscribers, then power cuts by the hundred."""
