// One subcomponent. `go(site, id)` opens another.
function showComponent(data,root,go){root.textContent='';const NS='http://www.w3.org/2000/svg',typed=labels(data.of),s=state(),V=i=>data.vocab[i];
let colour=s.get('colour')==='activation'?'activation':'importance',kind=['random','stratified'].includes(s.get('kind'))?s.get('kind'):'top';
const name=data.site+' · '+data.id;
const bar=make(root,'div','bar');const input=make(bar,'input');input.id='label';input.value=typed.get(data.site,data.id,data.label);input.placeholder=plainText(data.auto||'a label of your own');input.setAttribute('aria-label','label');
const said=make(bar,'span','note','');input.addEventListener('input',()=>{said.textContent=typed.set(data.site,data.id,input.value)?'saved in this browser':'kept until this page is closed: export it';});
const button=(parent,text,title,click)=>{const b=make(parent,'button','',text);b.title=title;b.onclick=click;return b};
button(bar,'export labels','export all labels typed in this browser as JSON',()=>{const all=Object.assign(Object.create(null),typed.all());if(input.value)all[labelKey(data.site,data.id)]=input.value;save('labels.json',labelFile(data.of,all),'application/json')}).id='labels';
button(bar,'export JSON','export everything on this page',()=>save(`component_${data.id}.json`,JSON.stringify(data,null,1)+'\n','application/json')).id='json';
button(bar,'export PNG','export a picture of histograms and contexts',()=>picture(b=>save(`component_${data.id}.png`,b,'image/png'))).id='png';
make(root,'p','note',data.auto).style.margin='.4rem 0';
const cols=make(root,'div','cols'),numbers=make(cols,'section');make(numbers,'h2','','In numbers');const t=make(numbers,'table');
data.numbers.forEach(([what,v,unit])=>{const r=make(t,'tr');make(r,'td','',what);make(r,'td','num',v===null?'not measured':unit==='%'?percent(v):unit==='n'?v.toLocaleString('en'):number(v)+(unit?' '+unit:''))});
histogram(make(cols,'section'),'Importance where it fires',data.importance,0);histogram(make(cols,'section'),'Activation where it fires',data.activation,1);
function bars(h){const top=Math.max(1,...h.counts);return h.counts.map(c=>c/top)}
// Where the axis is numbered: both ends, and 0 or the middle if there is room.
function marksOf(h){const n=h.counts.length,zero=h.edges.indexOf(0),m=zero>0&&zero<n?zero:Math.floor(n/2);return m>n*.15&&m<n*.85?[0,m,n]:[0,n]}
function histogram(parent,title,h,signed){make(parent,'h2','',title);const W=300,T=110,n=h.counts.length;
const svg=document.createElementNS(NS,'svg');svg.setAttribute('viewBox',`0 0 ${W} ${T+30}`);svg.setAttribute('width',W);svg.setAttribute('role','img');svg.setAttribute('aria-label',title);parent.append(svg);
const add=(tag,o,text)=>{const e=document.createElementNS(NS,tag);for(const k in o)e.setAttribute(k,o[k]);if(text!==undefined)e.textContent=text;svg.append(e);return e};
if(!n){add('text',{x:4,y:20},'it fires nowhere');return}
bars(h).forEach((v,i)=>{const r=add('rect',{x:i*W/n+.5,y:T-v*(T-8),width:Math.max(1,W/n-1),height:v*(T-8)});const title=document.createElementNS(NS,'title');
title.textContent=`${h.counts[i]} positions from ${number(h.edges[i])} to ${number(h.edges[i+1])}`;r.append(title)});
add('line',{x1:0,x2:W,y1:T,y2:T});marksOf(h).forEach(m=>add('text',{x:Math.max(1,Math.min(W-1,m*W/n)),y:T+12,'text-anchor':m===0?'start':m===n?'end':'middle'},number(h.edges[m])));
add('text',{x:W/2,y:T+26,'text-anchor':'middle'},(signed?'activation a, log scale':'importance g')+' · highest bar: '+Math.max(...h.counts).toLocaleString('en')+' positions')}
const tables=make(root,'div','cols');
function tokens(title,rows,note){if(!rows)return;const p=make(tables,'section');make(p,'h2','',title);if(!rows.length){make(p,'div','note','none');return}
let by=2;const table=make(p,'table'),head=make(table,'tr');make(head,'th','','token');const names=['count','precision','recall','PMI (nats)'],buttons=names.map((n,k)=>{const h=make(head,'th'),b=make(h,'button','',n);b.onclick=()=>{by=k+1;fill()};return b});
const body=make(table,'tbody');function fill(){buttons.forEach((b,k)=>b.classList.toggle('on',k+1===by));body.textContent='';
[...rows].sort((a,b)=>b[by]-a[by]||b[1]-a[1]).slice(0,12).forEach(r=>{const e=make(body,'tr');make(make(e,'td'),'span','tok',short(shown(V(r[0])),30));make(e,'td','num',r[1]);
make(e,'td','num',percent(r[2]));make(e,'td','num',percent(r[3]));make(e,'td','num',r[4].toFixed(2))})}fill();if(note)make(p,'div','note',note)}
tokens('Tokens it fires on',data.input,data.lost?`counts may be too small by up to ${data.lost}`:'');tokens('Tokens predicted there (likeliest)',data.predicted,'');
function written(title,rows){if(!rows)return;const p=make(tables,'section');make(p,'h2','',title);const table=make(p,'table');rows.forEach(r=>{const e=make(table,'tr');make(make(e,'td'),'span','tok',short(shown(V(r[0])),30));make(e,'td','num',(r[1]>0?'+':'')+number(r[1]))})}
written('U raises these logits most',data.raised);written('U lowers these logits most',data.lowered);
if(data.raised)make(root,'div','note','Logits: direct path, per unit of activation, the final normalisation as a scale of 1.');
function others(title,rows,what,note){if(!rows)return;const p=make(tables,'section');make(p,'h2','',title);if(!rows.length){make(p,'div','note','none');return}
const table=make(p,'table'),head=make(table,'tr');make(head,'th','','subcomponent');what.forEach(w=>make(head,'th','',w));
rows.forEach(([site,id,auto,has,...values])=>{const e=make(table,'tr'),c=make(e,'td');const label=(data.sites[site]===data.site?'':short(data.sites[site],40)+' · ')+id;
if(has){const a=make(c,'a','',label);a.href=go.href(site,id);if(go.inside)a.onclick=v=>{v.preventDefault();go.to(site,id)}}else c.textContent=plainText(label);
const words=typed.get(data.sites[site],id,'')||auto;c.title=plainText(words);if(values.length===1){c.append(' ');make(c,'span','note',short(words,28))}values.forEach(v=>make(e,'td','num',number(v)))});if(note)make(p,'div','note',note)}
others('Fires together with',data.cofires,data.cofireColumns||[]);others('Similar directions',data.similar,['cosine']);
const h=make(root,'h2','','Where it fires'),choices=make(root,'div','bar'),list=make(root,'div');list.id='contexts';
const kinds={top:'strongest',random:'random',stratified:'by range of importance'},kindButtons={},colourButtons={};
for(const k in kinds)if(data.contexts[k].length)kindButtons[k]=button(choices,kinds[k],'',()=>{kind=k;contexts()});make(choices,'span','grow');make(choices,'span','note','colour:');
['importance','activation'].forEach(k=>{colourButtons[k]=button(choices,k,'key: c',()=>{colour=k;contexts()});colourButtons[k].id='by_'+k});
const key=make(choices,'span','note');if(!kindButtons[kind])kind='top';
const most=Math.max(1e-30,...Object.values(data.contexts).flat().map(c=>Math.max(...c.a.map(Math.abs))));
function tint(g,a){const v=colour==='importance'?g:Math.min(1,Math.abs(a)/most);return[colour==='importance'?'imp':a<0?'neg':'pos',v]}
function contexts(){keep({colour:colour==='importance'?'':colour,kind:kind==='top'?'':kind});for(const k in kindButtons)kindButtons[k].classList.toggle('on',k===kind);for(const k in colourButtons)colourButtons[k].classList.toggle('on',k===colour);
key.textContent='';const swatch=(n,text)=>{const i=make(key,'i','key');i.style.background=`rgb(var(--${n})/.85)`;key.append(text)};
if(colour==='importance')swatch('imp','importance 1');else{swatch('pos','+'+number(most));swatch('neg','−'+number(most))}
list.textContent='';data.contexts[kind].forEach(c=>{const d=make(list,'div','text'),v=make(d,'span','v num',`g ${c.g[c.at].toFixed(2)}  a ${number(c.a[c.at])}`),p=make(d,'span','');
c.t.forEach((token,i)=>{const e=make(p,'span','t'+(i===c.at?' c':''),V(token).replace(/\n/g,'⏎').replace(/\t/g,'⇥')),[n,w]=tint(c.g[i],c.a[i]);if(w>.02)e.style.background=`rgb(var(--${n})/${(.95*w).toFixed(3)})`;if(w>.75)e.style.color='var(--on)';
e.title=plainText(shown(V(token)))+`: importance ${c.g[i]}, activation ${number(c.a[i])}`})})}
contexts();
function picture(done){const W=1000,shownContexts=data.contexts[kind].slice(0,10),Hh=250+shownContexts.length*26,canvas=document.createElement('canvas'),scale=2;canvas.width=W*scale;canvas.height=Hh*scale;
const x=canvas.getContext('2d'),css=getComputedStyle(document.documentElement),v=n=>css.getPropertyValue('--'+n).trim();x.scale(scale,scale);x.fillStyle=v('bg');x.fillRect(0,0,W,Hh);x.textBaseline='middle';
const write=(text,px,py,font,fill,w)=>{x.font=font;x.fillStyle=fill;x.fillText(plainText(text),px,py,w)};write(short(name,90),20,24,'bold 18px sans-serif',v('fg'),960);write(short(input.value||data.auto||'',130),20,50,'14px sans-serif',v('dim'),960);
[[data.importance,'importance where it fires',20],[data.activation,'activation where it fires',520]].forEach(([h,title,left])=>{write(title,left,78,'13px sans-serif',v('fg'));const n=h.counts.length||1;x.fillStyle=v('bar');
bars(h).forEach((b,i)=>x.fillRect(left+i*440/n,190-b*95,Math.max(1,440/n-1),b*95));if(h.counts.length)marksOf(h).forEach(m=>{x.textAlign=m===0?'left':m===n?'right':'center';write(number(h.edges[m]),left+m*440/n,202,'11px sans-serif',v('dim'))});x.textAlign='left'});
write(`colour: ${colour}`+(colour==='importance'?' (0 to 1)':` (± ${number(most)})`),20,226,'12px sans-serif',v('dim'));
shownContexts.forEach((c,k)=>{const y=250+k*26;x.font='13px monospace';const words=c.t.map(t=>short(shown(V(t)).replace(/␣/g,' '),24)),before=words.slice(0,c.at).reduce((w,t)=>w+x.measureText(t).width,0);let px=20+Math.max(0,330-before);
let i=0,skip=before-330;while(skip>0&&i<c.at){skip-=x.measureText(words[i]).width;i++}px=20+330-words.slice(i,c.at).reduce((w,t)=>w+x.measureText(t).width,0);
for(;i<words.length&&px<W-20;i++){const w=x.measureText(words[i]).width,[n,b]=tint(c.g[i],c.a[i]);x.fillStyle=`rgb(${v(n)} / ${.95*b})`;x.fillRect(px,y-11,w,22);write(words[i],px,y,'13px monospace',b>.75?v('on'):v('fg'));if(i===c.at){x.strokeStyle=v('fg');x.strokeRect(px-.5,y-11.5,w+1,23)}px+=w}});
canvas.toBlob(done,'image/png')}
return{keys(e){if(e.key==='c'){colour=colour==='importance'?'activation':'importance';contexts()}else if(e.key==='e'){e.preventDefault();input.focus();input.select()}
else if('123'.includes(e.key)){const k=Object.keys(kindButtons)[+e.key-1];if(k){kind=k;contexts()}}}}}
