// Characters that would reorder, hide or end other text are written out; the same as `visible` in pages.py.
const HIDDEN=/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]/gu;
const plainText=t=>t.replace(HIDDEN,c=>'<U+'+c.codePointAt(0).toString(16).toUpperCase().padStart(4,'0')+'>');
