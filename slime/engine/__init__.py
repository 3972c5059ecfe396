"""Serving: engines that speak SGLang's HTTP protocol, their router, and the client of both.

Reading order: `protocol`, `device_protocol` and `message` (what is sent), `client` and `connection` (how, with which
retries), `generate_answer` and `engine_info` (what comes back), `progress` and `refusals` (when a request is given
up), `launch`, `kinds`, `command_line`, `keyed`, `keys` and `server_process` (starting engines and the router),
`membership` (registering engines), `external` (engines that run already), `sleep` (giving memory back),
`bucket_layout`, `weight_group`, `update_sessions` and `presence` (receiving weights), and `embedded` (a CPU engine).
"""
