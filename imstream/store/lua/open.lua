-- Begin an attempt at a message. The reply stream decides (I4): a message that has ended, that belongs to another
-- request, or that is queued with another question, is not begun.
--
-- A request made from a dead letter may begin after 'failed', once: then 'reopened' is appended first, and the reply
-- belongs to that request.
--
-- An attempt begins again, or continues the text recorded by earlier ones. Then 'opened' holds all of that text, and
--   wire   the attempt that clients see: it stays if the caller has shown exactly this text, and no more
--   valid  up to where clients that follow earlier such attempts have text of this one: 'attempt:offset …'
--   usage  that of the calls that wrote the text
--
-- KEYS[1]  stream      reply to the message
-- KEYS[2]  set         nodes that hold a socket of the user
-- KEYS[3]  sorted set  messages of the user -> when they were asked, in ms since 1970; expires
-- ARGV[1]  the request that opens: node and entry id
-- ARGV[2]  milliseconds to keep the reply
-- ARGV[3]  a request known to be lost, from which the message may be taken over; or ''
-- ARGV[4]  the last attempt known to the caller, in case Redis has lost it: no number is given twice
-- ARGV[5]  the node that works on it
-- ARGV[6]  message id
-- ARGV[7]  question
-- ARGV[8]  digest of the whole question; '' if it is unknown, in requests of older releases
-- ARGV[9]  how many messages are kept in KEYS[3]
-- ARGV[10] milliseconds to keep KEYS[3]: longer than any reply that begins now
-- ARGV[11] recorded text is continued if it has fewer characters; 0: begin again
-- ARGV[12] how many characters the caller has shown in the attempt ARGV[4]; '' if it is not the writer
-- ARGV[13] usage of the calls that wrote them; '' if unknown
-- ARGV[14] '1' if the attempt ARGV[4] has made no call, and does not count
-- ARGV[15] a random word that all tries of one opening share: if another try, whose answer was lost, or which this one
--          runs after, has begun the latest attempt, nothing is written, and its answer is returned again
-- ARGV[16] '1' if the request was made from a dead letter
-- ARGV[17] milliseconds since an operator's pause ended, '' if none is known: no time before that counts as waited
-- Returns  {'opened', id of the entry, attempt, counted attempts before it, milliseconds since it began to wait or '',
--           node, …}
--          | {'continued', the same four, {wire, valid, usage, text}, node, …}
--          | {'ended', event, owner} | {'duplicate', owner} | {'other_question'}

local TERMINAL = {done = true, failed = true, cancelled = true}

local function field(entry, name)
    for i = 1, #entry[2], 2 do
        if entry[2][i] == name then
            return entry[2][i + 1]
        end
    end
end

-- The latest 'opened', looked for from the end, and when the message began to wait for its backend, unless it has got
-- text since, or a pause has ended an attempt (it waits, and not since a time): then another wait begins another window.
-- Only a repeated opening needs them, and the text since then.
local texts = {} -- newest first
local function opened()
    local before, since = '+', nil
    while true do
        local page = redis.call('XREVRANGE', KEYS[1], before, '-', 'COUNT', 100)
        for _, entry in ipairs(page) do
            if since == nil then
                since = field(entry, 'since')
                if #texts > 0 or (field(entry, 'event') == 'waiting' and not since) then
                    since = false
                end
            end
            local text = field(entry, 'text') or ''
            if text ~= '' then
                texts[#texts + 1] = text
            end
            if field(entry, 'event') == 'opened' then
                return entry, since
            end
        end
        if #page < 100 then
            return nil
        end
        before = page[#page][1]
    end
end

local function owner()
    local entry = opened()
    return entry and field(entry, 'request') or ''
end

-- Whether a request has opened the reply before. One that runs late must not reopen it after a later request has failed.
local function has_opened(request)
    for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do
        if field(entry, 'request') == request then
            return true
        end
    end
    return false
end

-- How an attempt goes on from `entry`, the latest 'opened', at an offset.
local function continue(entry, attempt, offset)
    local wire, valid = field(entry, 'wire') or tostring(attempt), field(entry, 'valid') or ''
    if attempt ~= tonumber(ARGV[4]) or offset ~= tonumber(ARGV[12]) then -- somebody may have seen other text after it
        valid = valid .. ' ' .. wire .. ':' .. offset -- the offsets in it are not larger
        wire = math.max(attempt, tonumber(ARGV[4])) + 1
    end
    local parts = {}
    for i = #texts, 1, -1 do
        parts[#parts + 1] = texts[i]
    end
    local usage = ARGV[13] ~= '' and ARGV[13] or field(entry, 'usage') or ''
    return {offset = offset, wire = wire, valid = valid, usage = usage, text = table.concat(parts)}
end

-- Milliseconds since the message began to wait; '' if it has not.
local function time_since(since)
    local time = since and redis.call('TIME')
    return since and time[1] * 1000 + math.floor(time[2] / 1000) - since or ''
end

local nodes = redis.call('SMEMBERS', KEYS[2]) -- before any write: it fails if the key has another type

-- What is returned about the attempt that this entry begins.
local function answer(entry, waited)
    local told = {'opened', entry[1], field(entry, 'attempt'), field(entry, 'counted'), waited}
    if field(entry, 'wire') then
        told[1] = 'continued'
        told[6] = {field(entry, 'wire'), field(entry, 'valid'), field(entry, 'usage'), field(entry, 'text')}
    end
    for _, node in ipairs(nodes) do
        told[#told + 1] = node
    end
    return told
end

local attempt, counted, since, asked, continued, reopened = 0, 0, nil, '', nil, false
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if last then
    local event = field(last, 'event')
    if TERMINAL[event] then
        reopened = event == 'failed' and ARGV[16] == '1' and not has_opened(ARGV[1])
        if not reopened then
            return {'ended', event, owner()}
        end
    end
    attempt = tonumber(field(last, 'attempt'))
    if attempt > 0 and not reopened then
        local entry
        entry, since = opened()
        local request = entry and field(entry, 'request') or ''
        if request ~= ARGV[1] and request ~= ARGV[3] then
            return {'duplicate', request}
        end
        if entry and field(entry, 'try') == ARGV[15] then
            return answer(entry, time_since(since))
        end
        -- An attempt that did no more than wait for its backend does not count; older releases do not record the number.
        local is_unused = event == 'waiting' or ARGV[14] == '1' and attempt == tonumber(ARGV[4])
        counted = tonumber(entry and field(entry, 'counted') or attempt - 1) + (is_unused and 0 or 1)
        local offset = tonumber(field(last, 'offset'))
        if entry and request == ARGV[1] and offset > 0 and offset < tonumber(ARGV[11]) then
            if field(entry, 'wire') and offset > tonumber(field(entry, 'offset')) then
                counted = 0 -- it continued, and added text: as long as the answer goes on, no attempt is used up
            end
            continued = continue(entry, attempt, offset)
        end
    end
    asked = attempt == 0 and field(last, 'digest') or ''
    if asked ~= '' and ARGV[8] ~= '' and asked ~= ARGV[8] then
        return {'other_question'}
    end
end
local is_new = not last or attempt == 0 and asked == ''
local is_listed = last and attempt == 0 and field(last, 'request') -- older releases that list none do not write it
-- A write that needs no memory comes first: then the script may go on writing when memory is full, and drain.
local kept = redis.call('PEXPIRE', KEYS[1], ARGV[2])
attempt = math.max(attempt, tonumber(ARGV[4]))
if reopened then
    redis.call('XADD', KEYS[1], '*', 'attempt', attempt + 1, 'event', 'reopened', 'offset', 0, 'v', 1)
end
local waited = time_since(since)
local excess = since and ARGV[17] ~= '' and waited - ARGV[17] or 0
if excess > 0 then
    since, waited = since + excess, waited - excess
end
local entry = {
    'attempt', attempt + 1, 'event', 'opened', 'offset', continued and continued.offset or 0, 'v', 1,
    'request', ARGV[1], 'by', ARGV[5], 'counted', counted, 'try', ARGV[15]
}
local function add(name, value)
    entry[#entry + 1], entry[#entry + 2] = name, value
end
if since then
    add('since', since)
end
for _, name in ipairs(continued and {'wire', 'valid', 'usage', 'text'} or {}) do
    add(name, continued[name])
end
if is_new then -- the question is kept once: here, or in 'queued'
    add('question', ARGV[7])
    add('digest', ARGV[8])
end
local id = redis.call('XADD', KEYS[1], '*', unpack(entry))
if kept == 0 then -- there was no reply yet
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
end

-- As in mark_queued.lua, unless that has listed it. The list must not keep a message from being answered, should it have
-- another type.
local added = is_listed and 0 or redis.pcall('ZADD', KEYS[3], 'NX', string.match(id, '^%d+'), ARGV[6])
if type(added) == 'number' then
    local over = added == 1 and redis.call('ZCARD', KEYS[3]) - ARGV[9] or 0
    if over > 0 then
        redis.call('ZREM', KEYS[3], unpack(redis.call('ZRANGE', KEYS[3], 0, over - 1)))
    end
    if redis.call('PTTL', KEYS[3]) < tonumber(ARGV[10]) then
        redis.call('PEXPIRE', KEYS[3], math.floor(ARGV[10] * 1.2)) -- not again for each message
    end
end
return answer({id, entry}, waited)
