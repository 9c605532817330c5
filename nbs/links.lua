-- What the notebooks say for readers of the repository, for readers of the site:
-- a picture of results/ is the one beside the pages, a file outside nbs/ is the one on GitHub, and `05_fft` is a link to that notebook.
local repo = 'https://github.com/sigma-tokenizer/sigma-image-tokenizer/blob/main/'

local function there(name)
  local f = io.open(name)
  if f then f:close() end
  return f ~= nil
end

function Image(el)
  el.src = el.src:gsub('^%.%./results/.*/', '')
  return el
end

local function code(el)
  if el.text:match('^%d%d_[%w_]+$') and there(el.text .. '.ipynb') then return pandoc.Link({el}, el.text .. '.ipynb'), false end
end

return {
  {Image = Image},
  {traverse = 'topdown', Code = code, Link = function(el) el.target = el.target:gsub('^%.%./', repo); return el, false end},
}
