"""Serving: engines that speak SGLang's HTTP protocol, their router, and the client of both.

Reading order: `protocol` and `message` (what is sent), `client` and `connection` (how, with which retries), `progress`
(when a request is given up), `launch`, `kinds` and `membership` (starting and registering engines), `external`
(engines that run already), `bucket_layout`, `weight_group` and `update_sessions` (receiving weights), and `embedded` (a
CPU engine).
"""
