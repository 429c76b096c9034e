"""Commands that need no processes of their own: what lies in a bucket for people, its deletion, averages."""
