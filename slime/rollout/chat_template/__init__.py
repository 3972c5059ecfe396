"""Everything that renders chats: `render` writes a conversation, `spans` finds each message in it.

Reading order: `render` (a conversation up to the next answer), `spans` (where each message is in the whole text, and
which tokens are the assistant's own), `suffix` (the text of new messages after tokens that exist), `report` (whether a
longer conversation begins with the text of a shorter one).
"""

from slime.rollout.chat_template.render import continues_last_turn as continues_last_turn
from slime.rollout.chat_template.render import render_messages as render_messages
from slime.rollout.chat_template.render import render_text as render_text
from slime.rollout.chat_template.report import TemplateReport as TemplateReport
from slime.rollout.chat_template.report import template_report as template_report
from slime.rollout.chat_template.spans import Conversation as Conversation
from slime.rollout.chat_template.spans import ConversationTokens as ConversationTokens
from slime.rollout.chat_template.spans import MessageSpan as MessageSpan
from slime.rollout.chat_template.spans import conversation_tokens as conversation_tokens
from slime.rollout.chat_template.spans import render_conversation as render_conversation
from slime.rollout.chat_template.suffix import Suffix as Suffix
from slime.rollout.chat_template.suffix import render_suffix as render_suffix
