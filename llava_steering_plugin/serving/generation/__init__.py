"""Makes answers: what is asked, how an answer comes, and which slot makes it. It knows no HTTP."""
