const $=id=>document.getElementById(id),read=id=>JSON.parse($(id).textContent);
function make(parent,tag,cls,text){const e=document.createElement(tag);if(cls)e.className=cls;if(text!==undefined)e.textContent=plainText(String(text));if(parent)parent.append(e);return e}
const short=(t,n)=>{const c=[...t];return c.length>n?c.slice(0,n-1).join('')+'…':t};
const shown=t=>plainText(t.replace(/\n/g,'⏎').replace(/\t/g,'⇥').replace(/^ +/,m=>'␣'.repeat(m.length)))||'∅';
const number=v=>v===null||v===undefined?'–':v===0?'0':Math.abs(v)>=1e4||Math.abs(v)<1e-3?v.toExponential(1):String(+v.toPrecision(3));
const percent=v=>v===null?'–':v===0?'0 %':v<.0001?'<0.01 %':(100*v).toFixed(v<.1?2:1)+' %';
// Pages in frames of others have no storage: what they keep lasts as long as they do.
const memory=new Map(),store={get(k){try{return localStorage.getItem(k)}catch(e){return memory.has(k)?memory.get(k):null}},
set(k,v){try{localStorage.setItem(k,v);return true}catch(e){memory.set(k,v);return false}}};
const state=()=>new URLSearchParams(location.hash.slice(1));
function keep(values){const s=state();for(const k in values){if(values[k]===''||values[k]===null||values[k]===undefined)s.delete(k);else s.set(k,values[k])}
const text='#'+s;try{history.replaceState(null,'',text)}catch(e){}return s}
const THEMES=['auto','light','dark'];
function theme(button){const now=()=>THEMES.includes(store.get('spd_lens theme'))?store.get('spd_lens theme'):'auto';let chosen=now();
const paint=()=>{if(chosen==='auto')delete document.documentElement.dataset.theme;else document.documentElement.dataset.theme=chosen;button.textContent='◐ '+chosen};
button.onclick=()=>{chosen=THEMES[(THEMES.indexOf(chosen)+1)%3];store.set('spd_lens theme',chosen);paint()};paint()}
// Labels typed here, by "site\nid"; they count more than those that the page came with.
const labelKey=(site,id)=>site+'\n'+id;
function labels(of){const k='spd_lens labels '+of;let own={};const reload=()=>{try{own=JSON.parse(store.get(k)||'{}')||{}}catch(e){}};reload();
return{all:()=>own,reload,get:(site,id,given)=>{const v=own[labelKey(site,id)];return typeof v==='string'?v:given||''},
set:(site,id,text)=>{reload();own[labelKey(site,id)]=text;return store.set(k,JSON.stringify(own))}}}
function save(name,content,type){const a=document.createElement('a');a.href=URL.createObjectURL(content instanceof Blob?content:new Blob([content],{type}));
a.download=name;document.body.append(a);a.click();a.remove();setTimeout(()=>URL.revokeObjectURL(a.href),1e4)}
const labelFile=(of,map)=>{const out={};for(const k of Object.keys(map)){const i=k.lastIndexOf('\n'),site=k.slice(0,i);if(map[k])Object.defineProperty(out[site]||(out[site]=Object.create(null)),k.slice(i+1),{value:map[k],enumerable:true})}
return JSON.stringify({format:'spd_lens labels',format_version:1,decomposition:of,labels:out},null,1)+'\n'};
const typing=e=>e.ctrlKey||e.metaKey||e.altKey||/^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName);
